"""Whether an optimizer needs to know what the parameters of a model are."""

from collections.abc import Collection

from sharpwise.engine.options import Options
from sharpwise.rules import Rule
from sharpwise.rules.base import MatrixRule


def needs_roles(rule: Rule, options: Options, no_decay: Collection[str]) -> bool:
    """Whether anything goes by roles, blocks or rows: else every element moves by itself, at one rate."""
    by_rule = rule.has_blocks or isinstance(rule, MatrixRule) or type(rule).place is not Rule.place
    coded = any(format is not None and format.block for format in (options.storage.format, options.storage.aux))
    by_option = options.block_lr is not None or options.control is not None or coded
    return by_rule or by_option or bool(set(no_decay) - {"bias"})
