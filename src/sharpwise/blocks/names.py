"""Names of parameters: without wrappers, and collapsed where only a layer number differs."""

import re
from collections.abc import Iterable, Sequence

# What torch.compile, FSDP1 and activation checkpointing put in front of a name, at any depth ...
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# ... and DDP, DeepSpeed and AveragedModel at the outermost only: deeper down, `module` is an attribute like any other.
_OUTER = _WRAPPERS | {"module"}

IN_LAYER = re.compile(r"(?:(?P<stem>.+?)\.)??(?P<number>\d+)\.(?P<rest>.+)")
"""A name with a number in it, of a layer most likely: what is before and behind the first one."""


def canonical_name(name: str) -> str:
    """The name of a parameter without the prefixes that wrappers add.

    >>> canonical_name("_orig_mod.module.transformer.h.0._checkpoint_wrapped_module.ln_1.weight")
    'transformer.h.0.ln_1.weight'
    """
    path, _, leaf = name.rpartition(".")
    path = canonical_path(path)
    return f"{path}.{leaf}" if path else leaf


def canonical_path(path: str) -> str:
    """The same for the path of a module, where the last part may be a wrapper too.

    >>> canonical_path("module"), canonical_path("model._orig_mod")
    ('', 'model')
    """
    parts = path.split(".") if path else []
    while parts and parts[0] in _OUTER:
        del parts[0]
    return ".".join(part for part in parts if part not in _WRAPPERS)


def stem_and_number(name: str) -> tuple[str, int | None]:
    """A name with {} in place of its first number, and that number.

    >>> stem_and_number("h.11.ln_1.weight"), stem_and_number("wte.weight")
    (('h.{}.ln_1.weight', 11), ('wte.weight', None))
    """
    found = re.search(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", name)
    if found is None:
        return name, None
    return f"{name[: found.start()]}{{}}{name[found.end() :]}", int(found.group())


def collapse(names: Iterable[str]) -> list[str]:
    """One line for all names that differ in their first number only, in order of first appearance.

    >>> collapse(["h.0.ln.weight", "h.1.ln.weight", "h.3.ln.weight", "wte.weight"])
    ['h.{0..1,3}.ln.weight', 'wte.weight']
    """
    groups: dict[str, list[int | None]] = {}
    for name in names:
        stem, number = stem_and_number(name)
        groups.setdefault(stem, []).append(number)
    return [with_numbers(stem, numbers) for stem, numbers in groups.items()]


def with_numbers(stem: str, numbers: Sequence[int | None]) -> str:
    """The name of all that have these numbers in the place of {}; a stem without a number is a name.

    >>> with_numbers("h.{}.weight", [0, 1, 2]), with_numbers("wte.weight", [None])
    ('h.{0..2}.weight', 'wte.weight')
    """
    known = [number for number in numbers if number is not None]
    return stem.replace("{}", number_ranges(known), 1) if known else stem


def number_ranges(numbers: Iterable[int]) -> str:
    """Numbers in words: `7` for one, else braces with ranges.

    >>> number_ranges([3]), number_ranges([0, 1, 2, 5])
    ('3', '{0..2,5}')
    """
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    if len(runs) == 1 and runs[0][0] == runs[0][1]:
        return str(runs[0][0])
    return "{" + ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs) + "}"
