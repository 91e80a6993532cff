"""The arms of a comparison as the page shows them: colour, symbol, a short name, and what is known of each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sharpwise.report.figures import text
from sharpwise.report.html import breakable
from sharpwise.report.text import broken

Result = Mapping[str, Any]
Arm = Mapping[str, Any]

# Okabe and Ito's palette; its yellow and the two light ones are darkened, so that text in them can be read on white.
COLOURS = ("#333333", "#D55E00", "#0072B2", "#00845F", "#B3589A", "#A67C00", "#2488BE", "#882255")
# Every arm has a symbol of its own too: the name that figures have for it, and the letter that looks like it.
SYMBOLS = (
    ("circle", "●"), ("square", "■"), ("diamond", "◆"), ("triangle-up", "▲"),
    ("triangle-down", "▼"), ("cross", "✚"), ("star", "★"), ("star-diamond", "✦"),
)  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How an arm is drawn, in every figure and table alike."""

    colour: str
    symbol: str
    glyph: str


def looks(result: Result) -> dict[str, Look]:
    """The look of each arm by name; the baseline's is the grey circle, wherever it stands."""
    names = [arm["name"] for arm in result["arms"]]
    order = sorted(names, key=lambda name: name != result["baseline"])
    found = {}
    for i, name in enumerate(order):
        # A ninth arm has the first colour with the second symbol.
        symbol, glyph = SYMBOLS[(i + i // len(COLOURS)) % len(SYMBOLS)]
        found[name] = Look(COLOURS[i % len(COLOURS)], symbol, glyph)
    return {name: found[name] for name in names}


def short_name(name: str, width: int = 13, lines: int = 3) -> str:
    """A name for a figure: on several lines, cut where it is far too long, as markup.

    >>> short_name("adamw+reversed(blockwise)")
    'adamw+<br>reversed(<br>blockwise)'
    """
    rows = broken(name, width)
    if len(rows) > lines:
        rows = [*rows[: lines - 1], rows[lines - 1][: width - 1].rstrip() + "…"]
    return "<br>".join(text(row) for row in rows)


def figure_label(name: str, look: Look, width: int = 13, lines: int = 3) -> str:
    """Symbol and short name of an arm, as markup."""
    return f'<span style="color:{look.colour}">{look.glyph}</span> {short_name(name, width, lines)}'


def html_name(name: str, look: Look) -> str:
    """Symbol and name of an arm as HTML; the name may break after its signs."""
    return f'<span class="glyph" style="color:{look.colour}" aria-hidden="true">{look.glyph}</span> {breakable(name)}'


# --- what is known of an arm -----------------------------------------------------------------------------------------


def baseline_of(result: Result) -> Arm:
    """The arm that the others are compared with."""
    found: Arm = next(arm for arm in result["arms"] if arm["name"] == result["baseline"])
    return found


def candidates(result: Result) -> list[Arm]:
    """The arms other than the baseline."""
    return [arm for arm in result["arms"] if arm["name"] != result["baseline"]]


def ended(runs: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The runs that reached their end at a finite loss."""
    return [run for run in runs if run["final_loss"] is not None]


def diverged(arm: Arm) -> bool:
    """Whether the arm has final runs, and none of them reached its end."""
    return bool(arm["final"]) and not ended(arm["final"])


def chosen_lr(arm: Arm) -> float | None:
    """The learning rate that tuning chose, None where it has not yet."""
    lr = (arm["setting"] or {}).get("optimizer.lr")
    return None if lr is None else float(lr)


def trials(arm: Arm) -> int:
    """How many runs tuned the arm: those of learning rates and further settings, and those of its search."""
    return len(arm["tuning"]) + len(searched(arm)) + len(arm.get("refined", ()))


def searched(arm: Arm) -> list[Mapping[str, Any]]:
    """The runs of an arm's search, none where it has no search."""
    return list((arm.get("search") or {}).get("runs", ()))


def further(setting: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a setting says besides the learning rate."""
    return {key: value for key, value in (setting or {}).items() if key != "optimizer.lr"}


def setting_words(setting: Mapping[str, Any]) -> str:
    """A setting as people write it.

    >>> setting_words({"optimizer.lr": 0.003, "optimizer.weight_decay": 0.1})
    'lr 0.003, weight decay 0.1'
    """
    return ", ".join(f"{setting_name(key)} {value_words(value)}" for key, value in setting.items())


def setting_name(key: str) -> str:
    """The key of a setting, without the table that most of them are in."""
    return key.removeprefix("optimizer.").replace("_", " ")


def value_words(value: Any) -> str:
    """A value of a setting.

    >>> value_words({"Emb": {"weight_decay": 0.2, "betas": [0.9, 0.98]}})
    'Emb: weight decay 0.2, betas [0.9, 0.98]'
    """
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {setting_words(own)}" for name, own in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def paired(arm: Arm, baseline: Arm) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Final runs of both arms on the same seed, where both reached their end."""
    others = {run["seed"]: run for run in ended(baseline["final"])}
    for run in ended(arm["final"]):
        if run["seed"] in others:
            yield run, others[run["seed"]]


def varied(arm: Arm) -> Mapping[str, Any] | None:
    """A final run of an arm whose blocks have different learning rates, None where all have the same."""
    for run in sorted(arm["final"], key=lambda run: run["final_loss"] is None):
        curves = list(run["learning_rates"].values())
        if curves and any(curve != curves[0] for curve in curves):
            found: Mapping[str, Any] = run
            return found
    return None
