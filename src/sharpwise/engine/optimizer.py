"""BlockOptimizer: any rule, block_lr and storage as one `torch.optim.Optimizer`."""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sharpwise.block_lr import BlockLR, MeasuredLR
from sharpwise.blocks import BlockMap
from sharpwise.engine import binding, checks, foreign, loading
from sharpwise.engine import state as states
from sharpwise.engine.agreement import check_ranks_agree
from sharpwise.engine.backends import Backends
from sharpwise.engine.describe import explanation, lr_table, representation
from sharpwise.engine.guard import Scaling
from sharpwise.engine.layout import Layouts
from sharpwise.engine.live_model import check_adapted
from sharpwise.engine.measuring import check_sources
from sharpwise.engine.multipliers import Multipliers, factor_maps, product
from sharpwise.engine.options import KnownOptions, Options
from sharpwise.engine.recoding import announce, recoded, rename
from sharpwise.engine.rehearsal import live, on_a_device, rehearse, rehearse_control
from sharpwise.engine.roleless import needs_roles, warn_if_other
from sharpwise.engine.step import Stepper
from sharpwise.engine.view import ParamView
from sharpwise.engine.views import of_group, views_of
from sharpwise.rules import Rule
from sharpwise.shards import local
from sharpwise.table import Table

logger = logging.getLogger(__name__)
_COMPILES_ITSELF = (
    "the step of a sharpwise optimizer compiles itself, and stays out of torch.compile: compile the model, or forward "
    "and backward, and call optimizer.step() outside"
)
_KEPT = ("rule", "options", "blocks", "no_decay", "strict", "who", "_known", "_mapped")


class BlockOptimizer(KnownOptions, Optimizer):
    """Runs a rule over the blocks of a model. Use the named constructors (`sharpwise.AdamW`, ...), which document the
    arguments; this class adds nothing but the machinery.

    State is allocated together at the first of `step`, `state_dict`, `load_state_dict`, `init_state`.

    Args:
        first: a model, (name, tensor) pairs, or parameter groups or tensors, then with `model=`.
        rule: where to go.
        lr, weight_decay: of groups that do not say their own.
        options: block_lr, control, storage, clipping and all else that any rule may have.
        blocks: a BlockMap, or overrides by glob.
        model: that the tensors of `first` belong to.
        strict: raise where a parameter is not explained, even if nothing depends on it.
        no_decay: roles without weight decay, and "bias".
        process_group: processes that hold the same plain parameters, and share the work of whole matrices.
        who: the name that messages begin with.
    """

    _step_supports_amp_scaling: ClassVar[bool] = True  # what torch.amp.GradScaler asks
    _outside_dynamo: ClassVar[Callable[..., Any] | None] = None

    def __init__(
        self,
        first: Any,
        rule: Rule,
        *,
        lr: float | Tensor,
        weight_decay: float | Tensor,
        options: Options,
        blocks: BlockMap | Mapping[str, Any] | None = None,
        model: nn.Module | None = None,
        strict: bool = False,
        no_decay: Collection[str] = (),
        process_group: Any = None,
        who: str = "BlockOptimizer",
    ) -> None:
        self.rule, self.options, self.who = rule, options, who
        self.no_decay, self.strict = binding.check_roles_named(no_decay, who, "no_decay", ("bias",)), strict
        groups, self._known, model = binding.bind(first, model, blocks, who, needs_roles(rule, options, self.no_decay))
        self._mapped = isinstance(blocks, BlockMap)
        self.blocks = BlockMap(())
        self._model: Callable[[], nn.Module | None] = _no_model if model is None else weakref.ref(model)
        self._replicas = binding.replicas_of(model, process_group, who)
        self._reset()
        if options.varies:
            check_sources(options, rule, self._model() is not None, who)
        checks.check_storage(options.storage, who)
        if options.control is not None:
            rehearse_control(options.control, options.decoupled, who)
            if remark := options.control.remark(float(weight_decay)):
                logger.warning("%s: control %s: %s", who, options.control, remark)
        settings = {"lr": lr, "weight_decay": weight_decay, **rule.defaults, "rule": rule.name}
        super().__init__(groups, settings | options.settings)
        self._warn_if_frozen()

    def _reset(self) -> None:
        if BlockOptimizer._outside_dynamo is None:  # made here, as it imports dynamo, which importing us should not
            BlockOptimizer._outside_dynamo = torch.compiler.disable(BlockOptimizer._step, reason=_COMPILES_ITSELF)
        self._stepper: Stepper | None = None
        self._marks = checks.Marks([], {})
        self._backends = Backends(self._replicas)
        self._variants: list[tuple[Any, ...]] = []
        self._read: set[str] = set()
        self._agreed = False
        self._said: set[str] = set()

    # -- groups ----------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; tensors are matched to names by identity, (name, tensor) pairs by name.

        Raises:
            ValueError: for a parameter that the model does not have, or that is in a group already.
        """
        binding.check_is_group(param_group, self.who)
        group = dict(param_group)
        checks.check_spelled(group, self.defaults, self.who)
        binding.check_ordered(group["params"], self.who)
        own = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        names = binding.names_of(self._model())
        group["params"] = [i if binding.is_pair(i) else (binding.name_of(i, names, self.who), i) for i in own]
        binding.check_unique(group["params"], self.who)
        present = {n for g in self.param_groups for n in g["param_names"]}
        new = [(name, tensor) for name, tensor in group["params"] if name not in self._known]
        for name, _ in group["params"]:
            if name in present:
                raise ValueError(f"{self.who}: parameter {name!r} is in a group already")
        for key, value in self.defaults.items():
            group.setdefault(key, value)
        if self.options.control is not None and group["reference_lr"] is None:
            group["reference_lr"] = float(group["lr"])
        checks.check_settings(group, self.defaults, self.rule, self.who)
        before = self._known
        try:
            if new:
                more = BlockMap.unknown(new)
                self._check_roles(more, new=True)
                self._known = BlockMap((*self._known.segments, *more.segments))
            blocks = self._known.subset([name for name, _ in group["params"]])
            self._check_roles(blocks)
            if self.options.control is not None:
                states.check_momentum(self.options.control, of_group(self.rule, group), blocks.segments, self.who)
            if not group["params"]:
                group["param_names"] = []  # torch sets it from the parameters, and then misses it
            super().add_param_group(group)
        except Exception:
            self._known = before
            raise
        self.blocks = self._known.subset([n for g in self.param_groups for n in g["param_names"]])
        self._note_skipped()
        self._stepper = None

    def _check_roles(self, blocks: BlockMap, new: bool = False) -> None:
        block_lr, who = self.options.block_lr, self.who

        def unknown(what: str, more: str = "") -> TypeError | ValueError:
            if new:
                return binding.unexplained_later(who, what, blocks)
            return binding.unexplained(who, what, blocks, self._known, self._model(), self._mapped, more)

        binding.check_roles(blocks, self._known, self.rule, block_lr, self.strict, self._model(), unknown, who)
        warn_if_other(blocks, block_lr, who)

    def _probe(self, taken: int, source: MeasuredLR, updates: Mapping[str, Tensor] | None) -> dict[str, list[float]]:
        """What a probe of the model as it is finds of the segments of every parameter."""
        model = self._model()
        if model is None:
            raise RuntimeError(f"{self.who}: the model that the block_lr measures is gone; build the optimizer anew")
        assert self.options.probe is not None
        settings = {**source.probe_settings, **({} if updates is None else {"updates": updates})}
        with torch.enable_grad():
            return self.options.probe(model, self.options.probe_batches, self._known, seed=taken, **settings)

    # -- state -----------------------------------------------------------------------------------------------------

    def init_state(self) -> None:
        """Allocate all state now. Calling it again does nothing."""
        self._bind()

    def _bind(self, loading: Collection[str] = ()) -> Stepper:
        """The stepper of the parameters as they are now, with state allocated; also of frozen ones that are loaded."""
        current = [(n, p, g) for n, p, g in self._parameters() if p.requires_grad or self._holds(p) or n in loading]
        stepper, params = self._stepper, [p for _, p, _ in current]
        as_bound = self._marks.hold(params, self.state) and self._variants_now() == self._variants
        if stepper is not None and as_bound and not stepper.multipliers.overwritten():
            return stepper
        self._stepper = self._bound(current)
        self._marks, self._variants = checks.Marks(params, self.state), self._variants_now()
        self._gradients = checks.Gradients(self._stepper.named, self.who)
        return self._stepper

    @torch.inference_mode(False)  # state that is made in a validation loop is trained with later
    def _bound(self, current: list[tuple[str, Tensor, dict[str, Any]]]) -> Stepper:
        if checks.were_exchanged([(n, p) for n, p, _ in self._parameters()], self.state, self.who):
            self.state.clear()
        named = [(n, p) for n, p, _ in current]
        binding.check_shapes(named, self.blocks, self.who)
        binding.check_followed(named, self._model(), self.who)
        layouts = Layouts()
        by_param = [views_of(n, p, g, self.blocks[n], self.rule, layouts) for n, p, g in current]
        views = [view for own in by_param for view in own]
        if states.left_behind(views, self.state):
            self.state.clear()
        for rule, settings in {(v.rule, id(v.group)): (v.rule, v.settings) for v in views}.values():
            self._read |= rehearse(rule, settings)
        block_lr = self.options.block_lr
        factors = [] if block_lr is None else factor_maps(block_lr, self._known.segments)
        for view in views:
            view.decays = tuple(not {str(s.role), "bias" if s.bias else ""} & self.no_decay for s in view.segments)
        if not self.options.decoupled:
            checks.check_coupled(by_param, self.no_decay, self.who)
        for view in views:
            own = self.state[view.param]
            self._allocate(view, own, factors)
            if block_lr is not None:
                view.multipliers = tuple(own[view.state_key("lr_multiplier")].tolist())
            view.varies = self.options.varies
        self._note_skipped()
        multipliers = Multipliers(
            views, self.param_groups, self._known.segments, self.state, self.options, self._probe, self._said
        )
        return Stepper(views, self.state, self.options, self._backends, multipliers)

    def _allocate(self, view: ParamView, own: dict[str, Any], factors: Sequence[Mapping[str, Any]]) -> None:
        """Choose formats and units of a view, and allocate what the state of its parameter lacks."""
        view.formats = states.formats_of(view, self.options.storage)
        if self.options.control is not None:
            states.set_units(view, self.options.control, self.who)
        parts = [view.of_segments(by_name[view.name]) for by_name in factors]
        view.multipliers = product(parts, len(view.segments))
        states.check_step(view, own, self.who)
        states.complete(view, own, self.options.block_lr, parts)
        states.check_held(view, own, self.who)

    def _variants_now(self) -> list[tuple[Any, ...]]:
        """Of the rule in every group: the operations it takes, the numbers in them that are no scalars, and whether a
        device has any."""
        names, read = (*self.rule.hyperparameters, "weight_decay"), sorted(self._read)
        groups = [(*self.rule.variant(g), on_a_device([*map(g.get, names)])) for g in self.param_groups]
        return [(*own, *(live(g.get(n)) for n in read)) for own, g in zip(groups, self.param_groups, strict=True)]

    def _holds(self, param: Tensor) -> bool:
        """Whether state is allocated; others may have put theirs there before."""
        return "step" in self.state.get(param, {})

    def _warn_if_frozen(self) -> None:
        """Say once that no parameter can move."""
        if "frozen" not in self._said and binding.warn_if_frozen(self.param_groups, self.who):
            self._said.add("frozen")

    def _warn_if_idle(self) -> None:
        """Say once that no gradient arrived, which torch's optimizers pass over."""
        if not self._said & {"frozen", "idle"}:
            self._said.add("idle")
            logger.warning(binding.IDLE, self.who)

    def _parameters(self) -> list[tuple[str, Tensor, dict[str, Any]]]:
        for group in self.param_groups:
            binding.check_group(group["param_names"], group["params"], self.who)
        return [(n, p, g) for g in self.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)]

    def _note_skipped(self) -> None:
        """Write the steps that the stepper left out to where they are saved."""
        if self._stepper is not None and self.options.on_nonfinite == "skip":
            skipped = self._stepper.guard.note_skipped()
            for group in self.param_groups:
                group["skipped_steps"] += skipped

    def state_dict(self) -> dict[str, Any]:
        """As torch's: `state` by parameter index and `param_groups`, with `param_names`."""
        self._bind()
        self._note_skipped()
        return super().state_dict()

    @torch.inference_mode(False)
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load state by parameter name (by order where it carries none, as plain torch's).

        Everything is checked before anything is copied.

        Raises:
            ValueError: for the state of another model or rule, a missing name, or another shape.
        """
        state_dict = loading.hooked(self, state_dict, self._optimizer_load_state_dict_pre_hooks.values(), self.who)
        self._bind()
        self._note_skipped()
        saved = loading.read(state_dict, self.param_groups, self.rule.name, self.options.block_lr, self.who)
        merged = [{**group, **new} for group, new in zip(self.param_groups, saved.groups, strict=True)]
        foreign.check_settings(state_dict, merged, self.rule, self.who)
        for group in merged:
            checks.check_settings(group, self.defaults, self.rule, self.who)
        with loading.undone_on_error(self):
            for group, new in zip(self.param_groups, saved.groups, strict=True):
                group.update(new)
            begun = {name for name, own in saved.state.items() if "step" in own}
            pairs, changed = [], Counter[tuple[str, str]]()
            for v in self._bind(begun).views:
                if v is (v.siblings or (v,))[0]:
                    theirs = recoded(v, saved.state[v.name], saved.storages[v.name], changed, self.who)
                    pairs += loading.prepared(v, self.state[v.param], theirs, saved.ours, self.who)
            for group in state_dict["param_groups"]:
                loading.check_decay(group, self.defaults, self.who)
        announce(changed, self.who)
        with torch.no_grad():
            for target, value in pairs:
                target.copy_(value)
        if saved.anew:
            loading.begin_block_lr(self.state, self.param_groups, self.defaults)
        self._stepper = None
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __repr__(self) -> str:
        """The groups as torch shows them, but their parameters counted and not named."""
        return representation(type(self).__name__, self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        self._note_skipped()
        return {**super().__getstate__(), **{key: getattr(self, key) for key in _KEPT}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        rename([*self.state.values(), *self.param_groups, self.defaults])
        self._model, self._replicas = _no_model, None
        self._reset()

    # -- step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the gradients at hand; returns the closure's loss.

        Raises:
            TypeError: for sparse or complex gradients.
            FloatingPointError: for non-finite gradients under on_nonfinite="raise"; nothing is changed.
            RuntimeError: for parameters exchanged after the first step, or a model sharded behind the optimizer's back.
            ValueError: for flattened parameters; at the first step, for ranks with different models or settings.
        """
        assert BlockOptimizer._outside_dynamo is not None
        return BlockOptimizer._outside_dynamo(self, closure, torch.compiler.is_dynamo_compiling())

    def _step(self, closure: Callable[[], Any] | None, in_dynamo: bool) -> Any:
        if in_dynamo and "dynamo" not in self._said:
            self._said.add("dynamo")
            logger.warning("%s: %s", self.who, _COMPILES_ITSELF)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            checks.check_settings(group, self.defaults, self.rule, self.who)
        before = self._stepper
        stepper = self._bind()
        stepper.guard.squares = None
        stepper.counter.read()
        if stepper is not before or not self._agreed:
            checks.check_device(stepper.named, self.who)
        if not self._agreed:
            check_ranks_agree(stepper.views, self.options, self.who, self._replicas)
            self._agreed = True
        grads = self._gradients.local([p.grad for _, p in stepper.named])
        if all(g is None for g in grads):
            if not self._mapped:  # a map that was given may lack some
                check_adapted([p for _, p, _ in self._parameters()], self._model(), self._known.names(), self.who)
            self._warn_if_frozen()
            binding.check_followed(stepper.named, self._model(), self.who)
            self._warn_if_idle()
            return loss
        if stepper.counter.begun or not checks.is_empty_step(self.param_groups, grads, stepper.group, before is None):
            self._move(stepper, grads)
        return loss

    def _move(self, stepper: Stepper, grads: list[Tensor | None]) -> None:
        """Take a step with these gradients."""
        stepper.run(grads, self._scaling(stepper.on_host))

    def _scaling(self, read: bool) -> Scaling | None:
        """What a GradScaler left here for this step, as it does with torch's own fused optimizers."""
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        return None if scale is None and found_inf is None else Scaling(scale, found_inf, read)

    @property
    def skipped_steps(self) -> int:
        """Steps left out under on_nonfinite="skip"."""
        before = max((int(group.get("skipped_steps", 0)) for group in self.param_groups), default=0)
        return before + (0 if self._stepper is None else self._stepper.guard.skipped)

    @property
    def grad_norm(self) -> Tensor | None:
        """Global L2 norm of the gradients of the last step, taken or skipped, before clipping: fp64, 0-d, on device.

        None before the first step, and where steps do not read it: neither `max_grad_norm` nor `on_nonfinite` is set.
        """
        squares = None if self._stepper is None else self._stepper.guard.squares
        return None if squares is None else squares.root

    @property
    def compiled_graphs(self) -> int:
        """How many kernels have been compiled; constant after the first step."""
        return self._backends.built

    # -- what it does ----------------------------------------------------------------------------------------------

    def lr_multipliers(self) -> Table:
        """Per segment: its multiplier and its learning rate as they are now."""
        return lr_table(self._bind())

    def explain(self, verbose: bool = False) -> Table:
        """Per segment: rule, cut, blocks, lr, decay, storage, bytes of state, back end, and why no faster one.

        A row for each segment; printed, equal layers share a line (`verbose=True` prints all), and sums stand below.
        """
        return explanation(self._bind(), verbose)

    def state_bytes(self) -> int:
        """Bytes of all state tensors that this process holds."""
        self._bind()
        tensors = [t for own in self.state.values() for t in own.values() if isinstance(t, Tensor)]
        return sum(local(t).numel() * t.element_size() for t in tensors)


def _no_model() -> None:
    """In place of a reference to a model, where none was given or it was left behind by a copy."""


__all__ = ["BlockLR", "BlockOptimizer"]
