"""Print the folder in which a run saves checkpoints: `python save_folder.py [FLAGS OF THE RUN]`.

train.sh looks there to tell a run that moves on from one that is stuck. Whatever is wrong with the
flags or the file is the trainer's to say; here it means that the folder is unknown, and the line
stays empty.
"""

import argparse
import sys

import yaml


def save_folder(argv: list[str]) -> str:
    """Return the value of --save, from the flags or else from the file; empty if there is none."""
    # Every other flag of the run is left alone.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--save")
    parser.add_argument("--config")
    try:
        given, _ = parser.parse_known_args(argv)
    except argparse.ArgumentError:  # a flag without its value
        return ""
    if given.save is not None or given.config is None:
        return given.save or ""
    return _read_save(given.config)


def _read_save(config: str) -> str:
    """Return the value of `save` in a run's file; empty if there is none."""
    try:
        with open(config, encoding="utf-8") as file:
            settings = yaml.safe_load(file)
    except (OSError, ValueError, yaml.YAMLError):
        return ""
    value = settings.get("save") if isinstance(settings, dict) else None
    return value if isinstance(value, str) else ""


if __name__ == "__main__":
    print(save_folder(sys.argv[1:]))
