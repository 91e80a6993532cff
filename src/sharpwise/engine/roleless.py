"""Whether an optimizer needs to know what the parameters of a model are."""

import logging
from collections.abc import Collection

from sharpwise.block_lr import BlockLR
from sharpwise.blocks import BlockMap, Role
from sharpwise.engine.options import Options
from sharpwise.rules import Rule
from sharpwise.rules.base import MatrixRule

logger = logging.getLogger(__name__)


def warn_if_other(blocks: BlockMap, block_lr: BlockLR | None, who: str) -> None:
    """One line where learning rates by role concern less than half of a model."""
    if block_lr is None:
        return
    everything = sum(segment.numel for segment in blocks)
    other = sum(segment.numel for segment in blocks if segment.role is Role.OTHER)
    if 2 * other > everything:
        logger.warning(
            "%s: %d%% of the elements are 'other', for which block_lr has one multiplier: it does little; say what "
            "they are with blocks=, or leave block_lr out",
            who,
            100 * other // everything,
        )


def needs_roles(rule: Rule, options: Options, no_decay: Collection[str]) -> bool:
    """Whether anything goes by roles, blocks or rows: else every element moves by itself, at one rate."""
    assigns = (type(rule).assign, type(rule).place) != (Rule.assign, Rule.place)
    by_rule = assigns or isinstance(rule, MatrixRule) or rule.has_blocks
    coded = any(format is not None and format.block for format in (options.storage.format, options.storage.aux))
    by_option = options.block_lr is not None or options.control is not None or coded
    return by_rule or by_option or bool(set(no_decay) - {"bias"})
