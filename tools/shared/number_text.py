"""Spell numbers as people read them in tables and on axes."""

from datetime import UTC, datetime

NOTHING = "–"
"""What a table shows where there is no value."""


def short(number: float, _=None) -> str:
    """Shorten a number: 1500 -> "1.5K".

    matplotlib also passes the place of a tick, which is unused.
    """
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= 0.9995 * limit:  # what rounds to 1000 of a unit is 1 of the next
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def length(tokens: int) -> str:
    """Spell a count of tokens: 8192 -> "8Ki", 1000 -> "1,000"."""
    if tokens >= 2**20 and tokens % 2**20 == 0:
        return f"{tokens // 2**20}Mi"
    return f"{tokens // 1024}Ki" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,}"


def gibibytes(count: float) -> str:
    """Spell a count of bytes: 2**30 -> "1.00 GiB"."""
    return f"{count / 2**30:.2f} GiB"


def loss_text(value: float | None) -> str:
    """Spell a loss with four digits, or NOTHING where it is not known."""
    return NOTHING if value is None else f"{value:.4f}"


def gain_text(record: dict) -> str:
    """Spell a context gain, with its interval if known: "+0.120 [+0.100, +0.140]"."""
    return " ".join(filter(None, (f"{record['gain']:+.3f}", interval_text(record))))


def includes_zero(record: dict) -> bool:
    """Tell whether the 95 % interval of a context gain is known and holds 0."""
    low = record.get("gain_low")
    high = record.get("gain_high")
    return low is not None and high is not None and low <= 0 <= high


def duration(seconds: float) -> str:
    """Spell a time in its largest unit of which there are two: 5400 -> "90.0 minutes"."""
    for limit, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * limit:
            return f"{seconds / limit:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def moment(seconds: float) -> str:
    """Spell a time of day in UTC, given in seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def interval_text(record: dict) -> str:
    """Spell the 95 % interval of a context gain; empty where the record has none."""
    low = record.get("gain_low")
    high = record.get("gain_high")
    return "" if low is None or high is None else f"[{low:+.3f}, {high:+.3f}]"
