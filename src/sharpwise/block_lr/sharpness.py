"""SharpnessLR: learning rates by the sharpness of the blocks, measured while training (after arXiv 2502.19002).

    r_b = clip((S_ref / S_b)^power, 1, max_ratio)                                  normalize="reference"
    r_b = clip((C / S_b)^power, 1 / max_ratio, max_ratio),  C: prod r_b^n_b = 1    normalize="geometric"

S_b is the mean of the diagonal of the Fisher matrix over block b, of n_b elements, S_ref that of the reference type,
the norms. With power 0.6 the sharpnesses that the paper measured in a LLaMA give close to its 10, 8, 6, 4, 1. Under
Adam's preconditioner, which divides by the root of S, curvature itself goes as the root: power 0.5.

| source | S_b is, up to a factor of all blocks | costs |
|---|---|---|
| second_moment | mean of v-hat = v / (1 - b2^t), which AdamW and Adam-mini keep | nothing |
| centred | mean of (v-hat - m-hat^2) / (1 - U), the variance of the gradient; see `engine.measuring` | nothing |
| probe | that mean of the diagonal, by `sharpwise.probes.sharpness`, labels drawn from the model | a gradient |
| directional | u^T G u / u^T u, u: the rule's own update in b, G: the Gauss-Newton matrix | a product per type |
| norm_11 | mean over the rows of G in b of the sum of absolute entries, by `sharpwise.probes.norm_11` | 20 products |

The last three need `probe_batches=`, and take a gradient or a product of all of these.

Over the measurements log S of every segment is averaged with weights `ema`: log S <- ema log S + (1 - ema) log S_now;
S_b of a type is the mean over the elements of what its segments then have. One measurement moves nothing: multipliers
follow a segment from its second one on, and with `settle` only once two agree.

| symbol | name |
|---|---|
| S_b | measured |
| r_b | multipliers |

Departs: the paper measures once, by hand, and takes five fixed ratios. The position embedding is a type of its own.
The order of the S_b settles after about 2% of the steps only, so that nothing is measured before. Five fixed ratios of
a model of one's own: `sharpwise.probes.calibrate`.

Measured (docs/results/rates.md, models of 0.4M parameters): followed while training, none of these ended below AdamW,
and none orders the types as a search over their rates does. What norm_11 finds in the middle of another run, used from
the first step on by `calibrate(..., source="norm_11")`, ended far below it.
"""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from sharpwise.block_lr.base import NOTHING, Measured, Source, check_choices, is_number, ratios_of
from sharpwise.block_lr.blockwise import BY_TYPE, argument_of
from sharpwise.block_lr.measured import PhasedLR
from sharpwise.block_lr.ratios import ROUNDING, arithmetic, balanced, geometric
from sharpwise.blocks import BlockType, Role, Segment
from sharpwise.blocks.roles import meant

FIXABLE = {**{str(kind): argument for kind, argument in BY_TYPE.items()}, "pos_emb": "pos_emb"}
"""What `fixed` takes, and what each is called among the arguments of `BlockwiseLR`."""

_CHOICES = {
    "source": ("second_moment", "centred", "probe", "directional", "norm_11"),
    "by": ("type", "module"),
    "reference": tuple(map(str, BlockType)),
    "mean": ("arithmetic", "geometric"),
    "normalize": ("reference", "geometric"),
    "tied": ("both", "lookup", "head"),
    "per_occurrence": (False, True),
}
_FREE = ("second_moment", "centred")
_LARGEST = sys.float_info.max


@dataclass(frozen=True, kw_only=True)
class SharpnessLR(PhasedLR):
    """Multipliers that follow the measured sharpness of the blocks.

    Args:
        power: of the ratio of sharpnesses, >= 0.
        max_ratio: largest multiplier, >= 1; the smallest is 1, or 1 / max_ratio under normalize="geometric".
        source: "second_moment" or "centred" (of AdamW and Adam-mini); "probe", "directional" (of these two as well) or
            "norm_11", for which the optimizer needs `probe_batches=`.
        by: one multiplier per "type" of block, or per "module", that is for every segment.
        reference: the block type that has multiplier 1 per type, under normalize="reference".
        start, stop, every, soft: when; see `PhasedLR`. start="peak" waits for the end of the warm-up.
        ema: weight of what was measured before, in [0, 1).
        mean: of the sharpness of the segments of a type, weighted with their elements.
        normalize: relative to a "reference" type that has 1, all others more; or "geometric": from 1 / max_ratio to
            max_ratio, a pure redistribution, whose geometric mean over all elements is 1 (without those of `fixed`).
        fixed: multipliers > 0 of types that do not follow, from the first step on: {"Emb": 10}; "pos_emb" is one.
        tied: a tied embedding is measured as "both" uses of it together, as the "lookup" alone, or as the output
            "head" alone. The second moment is of the sum of both gradients and cannot tell them apart, nor can the
            first: it takes source="probe", "directional" or "norm_11".
        per_occurrence: the sharpness of a token embedding per occurrence of a token: times its rows. A token meets one
            row of the table, so that the mean over rows of how often one is met is 1 / rows, whatever the text;
            nothing has to be counted. The head of a tied embedding meets all rows at every token: give tied="lookup".
        settle: multipliers follow once the ratios of no two blocks have moved by more than this, as a logarithm,
            from what was kept before to the measurement at hand (0.2: by a fifth); from then on they do so whatever
            is measured. None: from the second measurement on.
        decay: see `BlockLR`.

    >>> print(SharpnessLR(source="centred", power=0.5, max_ratio=4, normalize="geometric", fixed={"Emb": 10}))
    sharpness(power=0.5, max_ratio=4, source=centred, normalize=geometric, fixed={Emb: 10})
    """

    power: float = 0.6
    max_ratio: float = 10.0
    source: Literal["second_moment", "centred", "probe", "directional", "norm_11"] = "second_moment"
    by: Literal["type", "module"] = "type"
    reference: str = "Norm"
    start: float | Literal["peak"] = 0.02
    every: int = 200
    soft: int | None = 10
    ema: float = 0.5
    mean: Literal["arithmetic", "geometric"] = "arithmetic"
    normalize: Literal["reference", "geometric"] = "reference"
    fixed: Mapping[str, float] | Iterable[tuple[str, float]] = field(default=(), metadata={"as": dict})
    tied: Literal["both", "lookup", "head"] = "both"
    per_occurrence: bool = False
    settle: float | None = None

    name: ClassVar[str] = "sharpness"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, least, below in (("power", 0.0, math.inf), ("max_ratio", 1.0, math.inf), ("ema", 0.0, 1.0)):
            value = getattr(self, key)
            if not is_number(value) or not least <= value < below:
                raise ValueError(f"{self.name}: {key} must be a number in [{least:g}, {below:g}), got {value!r}")
        check_choices(self, _CHOICES)
        if self.settle is not None and not (is_number(self.settle) and 0.0 <= self.settle < math.inf):
            raise ValueError(f"{self.name}: settle must be a finite number >= 0, or None, got {self.settle!r}")
        if self.tied != "both" and self.source in _FREE:
            raise ValueError(
                f"{self.name}: tied={self.tied!r} is one use of a tied embedding, and source={self.source!r} is of the "
                f"sum of both; source must be probe, directional or norm_11"
            )
        if self.normalize == "geometric" and self.reference != "Norm":
            raise ValueError(
                f"{self.name}: reference={self.reference!r} has a meaning under normalize='reference' alone; leave it "
                f"out, as the geometric mean of all multipliers is 1"
            )
        object.__setattr__(self, "fixed", ratios_of(self.name, "fixed", self.fixed, "{'Emb': 10}"))
        for key in dict(self.fixed):
            if key not in FIXABLE:
                raise ValueError(f"{self.name}: fixed takes {', '.join(FIXABLE)}, got {key!r}{meant(key, FIXABLE)}")

    @property
    def _fixed(self) -> dict[str, float]:
        """By what `argument_of` says of a segment."""
        return {FIXABLE[key]: float(value) for key, value in dict(self.fixed).items()}

    @property
    def measures(self) -> Source:
        return "probe" if self.source == "norm_11" else self.source

    @property
    def probe_settings(self) -> Mapping[str, Any]:
        found = {} if self.source == "probe" else {"statistic": self.source, "by": self.by}
        return found if self.tied == "both" else {**found, "tied": self.tied}

    def updated(self, before: float, now: float) -> float:
        if not _known(now):
            return before
        if math.isnan(before):
            return now
        mean = before**self.ema * now ** (1 - self.ema)
        return min(max(mean, min(before, now)), max(before, now))  # rounding may lead out of the range of floats

    def settles(self, segments: Sequence[Segment], before: Sequence[float], now: Sequence[float]) -> list[bool]:
        twice = [_known(a) and _known(b) for a, b in zip(before, now, strict=True)]
        if self.settle is None:
            return twice
        fixed = self._fixed
        here = [i for i, s in enumerate(segments) if twice[i] and not s.frozen and argument_of(s) not in fixed]
        some = [segments[i] for i in here]
        was, found = (self._of_blocks(some, [values[i] for i in here])[1] for values in (before, now))
        moved = [math.log(b) - math.log(a) for a, b in zip(was, found, strict=True) if _known(a) and _known(b)]
        return twice if not moved or max(moved) - min(moved) <= self.settle else [False] * len(segments)

    def multipliers(self, segments: Sequence[Segment], measured: Measured = NOTHING) -> list[float]:
        means, own = self._of_blocks(segments, measured.get(self, [math.nan] * len(segments)))
        fixed = self._fixed
        kinds = [argument_of(segment) for segment in segments]
        if self.normalize == "geometric":
            free = [0 if s.frozen or k in fixed else s.numel for k, s in zip(kinds, segments, strict=True)]
            found = balanced(own, free, self.power, self.max_ratio)
        else:
            reference = means.get(BY_TYPE[BlockType(self.reference)], math.nan)
            found = [self.ratio(reference, value) for value in own]
        return [fixed.get(kind, value) for kind, value in zip(kinds, found, strict=True)]

    def _of_blocks(self, segments: Sequence[Segment], values: Sequence[float]) -> tuple[dict[str, float], list[float]]:
        """The sharpness of every type, and for each segment that of its block; NaN where it is not known."""
        kinds = [argument_of(segment) for segment in segments]
        rows = [s.rows if self.per_occurrence and s.role == Role.TOK_EMB else 1 for s in segments]
        own = [min(value * count, _LARGEST) for value, count in zip(values, rows, strict=True)]
        least = ROUNDING * max((v for v in own if not math.isnan(v)), default=0.0) if self.mean == "geometric" else 0.0
        known: dict[str, list[tuple[float, int]]] = {kind: [] for kind in kinds}
        for kind, value, segment in zip(kinds, own, segments, strict=True):
            if value >= least and not segment.frozen:
                known[kind].append((value, segment.numel))
        means = {kind: (geometric if self.mean == "geometric" else arithmetic)(some) for kind, some in known.items()}
        return means, own if self.by == "module" else [means[kind] for kind in kinds]

    def ratio(self, reference: float, sharpness: float) -> float:
        """The multiplier of a block of this sharpness; 1 where one of the two is NaN."""
        if math.isnan(reference) or math.isnan(sharpness):
            return 1.0
        log_ratio = self.power * (math.log(reference) - math.log(sharpness))
        return self.max_ratio if log_ratio >= math.log(self.max_ratio) else math.exp(max(log_ratio, 0.0))

    def unusable(self, segments: Sequence[Segment], now: Sequence[float]) -> str | None:
        if self.source != "centred":
            return None
        names = dict.fromkeys(s.name for s, value in zip(segments, now, strict=True) if value <= 0)
        if not names:
            return None
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return (
            f"the centred second moment is not positive (few steps, or gradients that hardly vary) of "
            f"{', '.join([*names][:3])}{more}: they keep what was measured of them before, 1 where nothing was"
        )

    def remarks(self, segments: Sequence[Segment], values: Sequence[float]) -> str | None:
        known = {s.block_type for s, value in zip(segments, values, strict=True) if not math.isnan(value)}
        if not known or self.reference in known or self.normalize != "reference":
            return None
        there = ", ".join(sorted(map(str, known)))
        return f"all multipliers are 1: the optimizer moves no {self.reference}; reference={there}?"

    def check_length(self, total_steps: int | None) -> None:
        start, stop = self.phase(total_steps)
        second = start + self.every * (2 if self.after_warmup else 1)
        if stop is not None and stop < second:
            raise ValueError(
                f"{self.name}: multipliers follow from the second measurement on, which is due at step {second} at the "
                f"earliest, and it would stop at {stop}; give a later stop, or a smaller every than {self.every}"
            )

    def doubts(self, total_steps: int | None) -> str | None:
        second = self.phase(total_steps)[0] + self.every * (2 if self.after_warmup else 1)
        if total_steps is None or second < total_steps:
            return None
        return (
            f"of {total_steps} steps none comes after the second measurement, due at step {second} at the earliest, "
            f"which multipliers follow: they stay as they are; a smaller every than {self.every}?"
        )

    def check(self, segments: Sequence[Segment]) -> None:
        trained = [segment for segment in segments if not segment.frozen]
        there = dict.fromkeys(str(segment.block_type) for segment in trained)
        if trained and self.reference not in there and self.normalize == "reference":
            raise ValueError(
                f"{self.name}: ratios are relative to the sharpness of {self.reference}, which no trained parameter "
                f"of this model is; reference must be one of {', '.join(there)}"
            )
        kinds = {argument_of(segment) for segment in segments}
        types = [key for key, argument in FIXABLE.items() if argument in kinds]
        for key, value in dict(self.fixed).items() if segments else ():
            if key not in types:
                raise ValueError(
                    f"{self.name}: fixed={{{key}: {value:g}}} is of a type that this model has not; it has "
                    f"{', '.join(types)}"
                )
        if self.per_occurrence and self.tied != "lookup":
            tied = next((s for s in segments if s.role == Role.TOK_EMB and s.tied), None)
            if tied is not None:
                raise ValueError(
                    f"{self.name}: per_occurrence=True is for a table that is only looked up, and {tied.name} is also "
                    f"{', '.join(tied.tied)}; measure the look-up alone: source='probe', tied='lookup'"
                )


def _known(value: float) -> bool:
    return 0.0 < value < math.inf
