"""What somebody asked for: a setting's value, and whether it was given or is only the default."""

from typing import Any

from pretrain.config.config import Config


def is_asked_for(config: Config, name: str) -> bool:
    """Return whether somebody gave the setting, with a value that asks for something."""
    value = value_of(config, name)
    if not value:  # switched off
        return False
    if config.given.settings:
        return name in config.given.settings
    return value != default_of(config, name)  # a configuration that was made in code


def value_of(config: Config, name: str) -> Any:
    """Return the setting's value, whichever section has it."""
    return getattr(_section_of(config, name), name)


def default_of(config: Config, name: str) -> Any:
    """Return the setting's default."""
    return getattr(type(_section_of(config, name))(), name)


def value_text(config: Config, name: str) -> str:
    """Return the setting as messages show it, like `lr = 0.001`."""
    return f"{name} = {text_of(value_of(config, name))}"


def text_of(value: Any) -> str:
    """Return a value as a user writes it."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _section_of(config: Config, name: str) -> Any:
    return next(section for section in vars(config).values() if name in vars(section))
