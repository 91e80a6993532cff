"""Hugging Face `Trainer`, and those of TRL: an optimizer that sees the model, at the numbers of `TrainingArguments`.

One line for all of them, after the trainer is made and before `trainer.train()`::

    set_optimizer(trainer, "adam-mini", block_lr="blockwise")

The Trainer calls what it is given as `optimizer_cls_and_kwargs` in two ways (transformers 5.23,
`Trainer.create_optimizer`): an Optimizer class with its own two groups, of tensors without names; anything else as
`cls()(model, **kwargs)`, and that is `Factory`. Under FSDP2 it is the only form: the Trainer refuses `optimizers=`
there, and exchanges the parameters of what it built itself for sharded ones.
"""

import inspect
import logging
from typing import Any

from torch import nn

from sharpwise.arms import split_arm
from sharpwise.engine import BlockOptimizer
from sharpwise.engine.binding import KEEP_SHAPES
from sharpwise.hints import kind_of
from sharpwise.optim import CONSTRUCTORS
from sharpwise.optim import create_optimizer as build

logger = logging.getLogger(__name__)


def set_optimizer(trainer: Any, name: str, **options: Any) -> None:
    """Have a Trainer build this optimizer, in place of the one that `TrainingArguments` name.

    For `transformers.Trainer` and every trainer made of it: TRL's SFT, Reward, DPO and GRPO, with or without
    `peft_config`, on one process, under DDP and under FSDP2.

    Args:
        trainer: made, and not trained yet.
        name: one of `sharpwise.list_optimizers()`, or a whole arm such as "adam-mini+blockwise".
        options: the keyword arguments of that optimizer; they go before the numbers of `TrainingArguments`.

    Raises:
        TypeError: for something that is no Trainer, and a class in place of the name.
        ValueError: for a trainer that has an optimizer, one that uses ZeRO, and as `sharpwise.create_optimizer`.
    """
    if not hasattr(trainer, "optimizer_cls_and_kwargs"):
        raise TypeError(f"set_optimizer: expected a transformers.Trainer, or one made of it, got {kind_of(trainer)}")
    if not isinstance(name, str):
        raise TypeError(f"set_optimizer: name must be text, such as 'adam-mini', got {kind_of(name)}")
    if trainer.optimizer is not None:
        raise ValueError(
            f"set_optimizer: the trainer has an optimizer, {type(trainer.optimizer).__name__}; call this before "
            f"trainer.train(), and leave out optimizers="
        )
    split_arm({**options, "name": name})  # a wrong name shows here, not after the data are prepared
    _refuse_deepspeed(trainer.args)
    trainer.optimizer_cls_and_kwargs = (Factory, {"args": trainer.args, "name": name, **options})


class Factory:
    """Builds a sharpwise optimizer inside the Trainer; `set_optimizer` gives it to one that exists already.

    Example::

        Trainer(
            model=model,
            args=args,
            optimizer_cls_and_kwargs=(Factory, {"args": args, "name": "adam-mini"}),
        )
    """

    def __call__(
        self, model: nn.Module | None = None, *training_args: Any, args: Any = None, name: str = "", **options: Any
    ) -> "BlockOptimizer | Factory":
        """The optimizer of `model`.

        Args:
            model: the model that the Trainer trains; without one the factory itself, so that `Factory()` serves too.
            training_args: what axolotl puts behind the model; `args` goes before it.
            args: the `TrainingArguments`; without them `lr` is needed, and no other number there has an effect.
            name, options: as `set_optimizer` takes them.

        Raises:
            TypeError: without a name, or with neither `args` nor `lr`; else as `sharpwise.create_optimizer`.
        """
        if model is None:
            return self
        if not isinstance(name, str) or not name:
            raise TypeError(
                f"Factory: name must be that of an optimizer, got {kind_of(name) if name else 'none'}; pass it: "
                f"optimizer_cls_and_kwargs=(Factory, {{'args': args, 'name': 'adam-mini'}})"
            )
        args = args if args is not None or not training_args else training_args[0]
        if args is not None:
            return create_optimizer(model, name, args, **options)
        if "lr" not in options:
            raise TypeError(
                f"Factory: no lr was given, and the Trainer does not tell a factory what its TrainingArguments hold; "
                f"pass them: optimizer_cls_and_kwargs=(Factory, {{'args': args, 'name': {name!r}}})"
            )
        if "weight_decay" not in options:
            logger.warning(
                "Factory: without 'args': args, the weight_decay and adam_* of TrainingArguments have no effect, and "
                "%s takes its own",
                name,
            )
        return build(model, name, **options)


def create_optimizer(model: nn.Module, name: str, args: Any, **options: Any) -> BlockOptimizer:
    """`sharpwise.create_optimizer`, at the numbers of `TrainingArguments`: for `Trainer(optimizers=(it, None))`.

    `learning_rate` and `weight_decay` are always used, `adam_beta1`, `adam_beta2` and `adam_epsilon` where they are not
    the default: then with a warning if the optimizer has no such number. Weight decay spares biases and norms as the
    Trainer's own does, unless `no_decay` is given. A `block_lr` with phases learns of `max_steps`.

    Args:
        model: what is trained: after `get_peft_model`, if that is called.
        name, options: as `set_optimizer` takes them.
        args: the `TrainingArguments`.

    Raises:
        ValueError: for DeepSpeed's ZeRO; else as `sharpwise.create_optimizer`.
    """
    _refuse_deepspeed(args)
    arm, given = split_arm({"name": name}), split_arm({**options, "name": name})
    numbers = _numbers(args, arm["name"])
    if not args.weight_decay and "weight_decay" in arm:  # 0 is the Trainer's default, against that of "lionar"
        del numbers["weight_decay"]
    settings = {**arm, **numbers, **options, "name": arm["name"]}
    if "block_lr" in given:
        settings["block_lr"] = given["block_lr"]
    if settings.get("block_lr") and args.max_steps > 0:
        settings.setdefault("total_steps", args.max_steps)
    if "no_decay" in options:
        return build(model, **settings)
    return build(_groups(model), model=model, **settings)


def _numbers(args: Any, name: str) -> dict[str, Any]:
    """What an optimizer takes of `TrainingArguments`; warns of what it cannot take."""
    known = inspect.signature(CONSTRUCTORS[name]).parameters
    found = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    lost = []
    for option, keys in (("betas", ("adam_beta1", "adam_beta2")), ("eps", ("adam_epsilon",))):
        changed = [key for key in keys if getattr(args, key) != _default(args, key)]
        if changed and option in known:
            values = tuple(getattr(args, key) for key in keys)
            found[option] = values if option == "betas" else values[0]
        elif changed:
            lost += changed
    if getattr(args, "optim", None) != _default(args, "optim"):
        given = getattr(args.optim, "value", args.optim)
        logger.warning("optim=%s of TrainingArguments not used: the optimizer is %s", given, name)
    if lost:
        own = [key for key in known if key == "eps" or key.endswith(("betas", "beta2", "_eps", "momentum"))]
        logger.warning(
            "%s of TrainingArguments not used: the optimizer is %s, which has %s; give these to set_optimizer",
            ", ".join(lost),
            name,
            ", ".join(own),
        )
    return found


def _default(args: Any, key: str) -> Any:
    """The default of a field of a dataclass."""
    field = type(args).__dataclass_fields__[key]
    return field.default_factory() if callable(field.default_factory) else field.default


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """The Trainer's own two groups, with names: what decays, and what does not."""
    from transformers import Trainer

    decays = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    first = {"params": [(n, p) for n, p in named if n in decays]}
    second = {"params": [(n, p) for n, p in named if n not in decays], "weight_decay": 0.0}
    return [group for group in (first, second) if group["params"]]


def _refuse_deepspeed(args: Any) -> None:
    given, plugin = getattr(args, "deepspeed", None), getattr(args, "deepspeed_plugin", None)
    stage = getattr(plugin, "zero_stage", None)
    if (given or plugin) and stage != 0:  # which shards nothing
        got = f"deepspeed={given!r}" if given else f"stage {stage} of ZeRO from `accelerate launch`"
        raise ValueError(f"the Trainer is set to use DeepSpeed, got {got}. {KEEP_SHAPES}")
