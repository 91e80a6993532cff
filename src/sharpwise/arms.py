"""Arms of a comparison by name: an optimizer, or an optimizer + a block_lr, such as "adam-mini+blockwise"."""

from collections.abc import Mapping
from typing import Any

from sharpwise.block_lr import make_block_lr
from sharpwise.block_lr.spelling import ABLATIONS, BLOCK_LRS
from sharpwise.combinations import APART, COMBINES, PRESETS
from sharpwise.hints import nearest


def parse_arm(text: str) -> dict[str, str]:
    """What one arm of a comparison is, from its name: an optimizer, or an optimizer + a block_lr.

    Returns:
        `name`, for one of `PRESETS` the options that it stands for, and, where there is one, `block_lr` in its
        canonical spelling: for `create_optimizer`, or the table [optimizer] of a configuration.

    Raises:
        ValueError: for an unknown optimizer, or a block_lr that `make_block_lr` refuses.

    >>> parse_arm("adam-mini+reversed(blockwise)")
    {'name': 'adam-mini', 'block_lr': 'reversed(blockwise)'}
    """
    before, plus, after = str(text).partition("+")
    name, block_lr = before.strip(), after.strip()
    names = sorted([*COMBINES, *PRESETS, *APART])
    if not isinstance(text, str) or name not in names:
        called = f"{name!r}{nearest(name, names)}" if isinstance(text, str) else repr(text)
        alone = not plus and name.partition("(")[0] in {*BLOCK_LRS, *ABLATIONS}
        hint = f"; it is a learning rate per block, for instance of adamw: adamw+{name}" if alone else ""
        raise ValueError(f"no optimizer is called {called}; there are {', '.join(names)}{hint}")
    found = PRESETS.get(name, {"name": name})
    if not plus:
        return dict(found)
    if not block_lr:
        raise ValueError(f"{text!r} names no block_lr after the +; write {name}, or for instance {name}+blockwise")
    return {**found, "block_lr": str(make_block_lr(block_lr))}


def arm_name(arm: Mapping[str, str]) -> str:
    """The name that `parse_arm` reads as this.

    >>> arm_name(parse_arm("muon-8bit + blockwise"))
    'muon-8bit+blockwise'
    """
    own = {key: value for key, value in arm.items() if key != "block_lr"}
    names = [name for name, preset in PRESETS.items() if preset == own] or [arm["name"]]
    return "+".join([names[0], *([arm["block_lr"]] if "block_lr" in arm else [])])


def split_arm(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an optimizer, by `name`, which may be a whole arm: with its name and its block_lr apart.

    Raises:
        ValueError: as `parse_arm`; or where `block_lr` is given too, and is another one.
    """
    arm = parse_arm(settings["name"])
    given = settings.get("block_lr")
    if "block_lr" in arm and given not in (None, "") and make_block_lr(given) != make_block_lr(arm["block_lr"]):
        raise ValueError(
            f"two different block_lrs are given: {arm['block_lr']} in {settings['name']!r}, and "
            f"block_lr={make_block_lr(given)}; leave out one of them"
        )
    return {**arm, **settings, **{key: arm[key] for key in ("name", "block_lr") if key in arm}}
