"""Numbers in words, and what every reader of a run has to know."""

import math
import re
from itertools import pairwise

# Below this many tokens per parameter a run is short (Training Compute-Optimal Large Language Models, 2203.15556).
USUAL_TOKENS_PER_PARAMETER = 20


def mebibytes(value: float | None) -> str:
    """A number of bytes, as the tables of results show it.

    >>> mebibytes(3 * 2**20), mebibytes(None)
    ('3.00 MiB', '-')
    """
    return "-" if value is None else f"{value / 2**20:.2f} MiB"


def number(value: float | None, spec: str, unit: str = "") -> str:
    """A number with its unit, or a dash.

    >>> number(1234.5, ",.0f", " ms"), number(None, ",.0f")
    ('1,234 ms', '-')
    """
    return "-" if value is None else f"{value:{spec}}{unit}"


def short(value: float | None) -> str:
    """A count in at most five letters, in units of thousands or more where it is long.

    >>> [short(x) for x in (None, 7.4, 9999, 12_345, 124_439_808, 2.5e9, 1e13)]
    ['-', '7', '9999', '12.3k', '124M', '2.5B', '10T']
    """
    if value is None:
        return "-"
    if abs(value) < 9999.5:
        return f"{value:.0f}"
    units = ("", "k", "M", "B", "T")
    unit = 0
    while abs(value) >= 999.5 and unit < len(units) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g}{units[unit]}" if abs(value) < 1000 else f"{value:.0f}{units[unit]}"


def perplexity(loss: float) -> str:
    """The perplexity of a loss in nats per token.

    >>> perplexity(math.log(24.96)), perplexity(1e9)
    ('25.0', 'beyond 1e+30')
    """
    if loss > math.log(1e30):
        return "beyond 1e+30"
    value = math.exp(loss)
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}" if value < 1e7 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """A length of time, by its two largest units.

    >>> [duration(s) for s in (0.25, 59.6, 61, 7260, 200_000)]
    ['0.2 s', '1 min 0 s', '1 min 1 s', '2 h 1 min', '2 d 7 h']
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    rest = round(seconds)
    if rest < 60:
        return f"{rest} s"
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    for (large, name), (small, other) in pairwise(units):
        if rest >= large:
            return f"{rest // large} {name} {rest % large // small} {other}"
    raise AssertionError("a minute and more has a unit")


def moment(iso: str) -> str:
    """A date and time as people write it.

    >>> moment("2026-01-02T03:04:05+00:00")
    '2026-01-02 03:04:05 UTC'
    """
    return iso.replace("T", " ").replace("+00:00", " UTC")


def broken(name: str, width: int) -> list[str]:
    """A name on lines of a width, broken after its signs where that is possible.

    >>> broken("study/runs/adamw+blockwise", 12)
    ['study/runs/', 'adamw+', 'blockwise']
    """
    lines = [""]
    for part in re.findall(r"[^-+(,/_ ]*[-+(,/_ ]|[^-+(,/_ ]+", name):
        for piece in (part[i : i + width] for i in range(0, len(part), width)):
            if lines[-1] and len((lines[-1] + piece).rstrip()) > width:
                lines.append("")
            lines[-1] += piece
    return [line.strip() for line in lines]
