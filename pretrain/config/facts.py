"""What a setting's declaration says besides its type and default: the metadata of its field.

    lr: float = setting(3e-4, per_phase=True, resume="effect", above=0)

The sections of model/, parallel/ and data/, which do not import pretrain/, write the same as

    lr: float = field(default=3e-4, metadata=dict(per_phase=True, resume="effect", above=0))

Whatever is derived from these facts (the keys of a phase, the resume contract, the checks of
single values, the pages of settings and flags) reads them here.
"""

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from math import isfinite
from typing import Any, ClassVar, Literal, Protocol

Resume = Literal["forbidden", "tokenizer", "data", "optimization", "scheduler", "free", "effect"]
"""What a change of a setting means on continuing (pretrain/checkpointing/resume_contract.py)."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is true of one setting."""

    per_phase: bool = False
    """An entry of `phases:` may have its own value."""
    resume: Resume | None = None
    """What a change means on continuing; None = what its section says."""
    is_path: bool = False
    """It names files: another spelling of the same place is no difference."""
    of_weights: bool = True
    """--use-checkpoint-args takes it from the checkpoint; False = the machine's, or a check."""
    above: float | None = None
    """Values, and items of lists, must be greater."""
    at_least: float | None = None
    """Values, and items of lists, must not be less."""
    only: Any = None
    """The only value that is built."""
    fix: str = ""
    """What to do about a value that is not allowed, where the usual words do not help."""

    def problem(self, name: str, value: Any) -> str | None:
        """Say why the value is not allowed, as `name = value: rule. Fix: ...`."""
        given = f"{name} = {value}"
        if self.only is not None and value != self.only:
            return f"{given}: only {self.only} is built. Fix: remove it."
        if isinstance(value, float) and not isfinite(value):
            return f"{given}: must be a finite number. Fix: {self.fix or 'give one'}."
        if self.above is not None and value <= self.above:
            fix = self.fix or "give a positive number"
            return f"{given}: must be above {self.above}. Fix: {fix}."
        if self.at_least is not None and value < self.at_least:
            fix = self.fix or f"give {self.at_least} or more"
            return f"{given}: must be at least {self.at_least}. Fix: {fix}."
        return None


class Section(Protocol):
    """A dataclass of settings."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def validate(self) -> list[str]:
        """List the problems of settings with each other."""
        ...


def setting(default: Any, **facts: Any) -> Any:
    """Declare a field with facts; a type as default (`list`) makes a new value for each object."""
    Facts(**facts)  # a misspelled fact fails here
    if isinstance(default, type):
        return field(default_factory=default, metadata=facts)
    return field(default=default, metadata=facts)


def facts_of(declared: Field) -> Facts:
    """Read the facts of a field."""
    metadata: Mapping[str, Any] = declared.metadata
    return Facts(**metadata)


def facts_of_section(section: Any) -> dict[str, Facts]:
    """Read the facts of all settings of a section, an object or its class."""
    return {declared.name: facts_of(declared) for declared in fields(section)}


def problems_of(section: Section) -> list[str]:
    """List the problems of a section: values that are not allowed, and what it says itself."""
    problems = []
    for name, facts in facts_of_section(section).items():
        value = getattr(section, name)
        # A setting that was left out (None) is legal.
        items = value if isinstance(value, list) else [] if value is None else [value]
        problems += [text for item in items if (text := facts.problem(name, item))]
    return problems + section.validate()


def at_most_one(section: Any, *names: str) -> list[str]:
    """List the settings that are given, where more than one of `names` is: they mean one thing."""
    given = [
        f"{name} = {getattr(section, name)}" for name in names if getattr(section, name) is not None
    ]
    if len(given) < 2:
        return []
    return [f"{', '.join(given)}: at most one of these may be given. Fix: keep one."]
