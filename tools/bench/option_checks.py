"""Check the options that count something: a benchmark has no median of no values."""

from typing import Any


def find_too_small(arguments: Any, **least: float) -> str | None:
    """Say which option is too small, or has no value at all, with a fix; None = none is.

    Args:
        arguments: the options of a benchmark. One that is None was not given, and is not checked.
        least: name of an option -> its smallest value. Where it takes several values it must have
            one, and none may be smaller.
    """
    for name, smallest in least.items():
        given = getattr(arguments, name)
        if given is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        values = given if isinstance(given, tuple | list) else (given,)
        if not values:
            return f"{flag}: has no value. Fix: give at least one."
        if min(values) < smallest:
            shown = " ".join(map(str, values))
            return f"{flag} {shown}: must be at least {smallest}. Fix: give {smallest} or more."
    return None
