"""Numbers as people read them in tables and on axes."""


def short(number: float, _=None) -> str:
    """1500 -> "1.5K"; the second argument is matplotlib's."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= 0.9995 * limit:  # what rounds to 1000 of a unit is 1 of the next
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def length(tokens: int) -> str:
    """8192 -> "8Ki", 1000 -> "1,000"."""
    if tokens >= 2**20 and tokens % 2**20 == 0:
        return f"{tokens // 2**20}Mi"
    return f"{tokens // 1024}Ki" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,}"


def gibibytes(count: float) -> str:
    """2**30 -> "1.00 GiB"."""
    return f"{count / 2**30:.2f} GiB"
