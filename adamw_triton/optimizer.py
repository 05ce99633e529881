"""class AdamW: arguments, state, step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from . import checkpoint, graphs, storage
from .bucket import Bucket, set_statistics, statistics_of
from .checks import check_hyper, check_implementation, check_param, check_storage
from .compiled import CompiledStep
from .control import Control, Limits, Scaling
from .plan import Frame, Plan
from .release import GradientRelease
from .scalars import set_decay_lr
from .state import ParamState, State
from .storage import Policy, StateBytes


def _limit(name: str) -> Any:
    def get(self: AdamW) -> Any:
        return getattr(self._limits, name)

    def set_(self: AdamW, value: Any) -> None:
        limits = self._limits._replace(**{name: value})
        limits.check()
        if self._release is not None and limits.max_grad_norm is not None:
            raise ValueError(
                f"max_grad_norm={value!r}: gradient release steps before the norm of all gradients is known"
            )
        self._limits = limits

    return property(get, set_)


class AdamW(Optimizer):
    r"""AdamW in one kernel: a drop-in replacement for `torch.optim.AdamW`.

    `AdamW(params, lr=1e-3, weight_decay=1e-2)` takes the steps that `torch.optim.AdamW` takes with the same
    arguments, and reads and writes its checkpoints. For a parameter :math:`\theta` with gradient :math:`g`
    at its step :math:`t`:

    .. math::
        \theta &\leftarrow \theta (1 - \eta\lambda) \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \theta &\leftarrow \theta - \eta\, \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    Arithmetic is in float32 (float64 for float64 parameters) for any mix of float32, bfloat16 and float16
    parameters, gradients and state; every value is rounded once, when it is stored.

    Args:
        params: iterable of parameters, of (name, parameter) pairs, or of dicts that define groups.
        lr: learning rate :math:`\eta`; a float or a 0-d tensor, which may change in place between steps.
        betas: decay rates :math:`\beta_1, \beta_2` of the moments; floats or 0-d tensors.
        eps: :math:`\epsilon`, added outside of the square root.
        weight_decay: :math:`\lambda`, multiplied by the learning rate as in PyTorch, unlike the paper's; a float or
            a 0-d tensor.
        amsgrad: divide by the maximum of all v so far (https://openreview.net/forum?id=ryQu7f-RZ).
        maximize: ascend instead of descend.
        foreach: True: one launch for all tensors that share dtypes; False: one for each tensor; None: one
            for all, unless there is only one.
        capturable: True: `step` lives on the parameters' device, so that a CUDA graph can hold whole steps. What shall
            change between replays (lr, betas, weight_decay) must be a 0-d tensor on the device then; a number is
            frozen into the graph.
        differentiable: only False.
        fused: True announces that `torch.amp.GradScaler` may leave unscaling to the step. The kernel is the
            same in any case.
        exp_avg_dtype: storage of m: float32, bfloat16, float16, or int8 with a float32 scale for each 128 elements.
            None: the parameter's dtype, as in torch, or float32 with `master_weight_bits`.
        exp_avg_sq_dtype: storage of v: float32, bfloat16, float16 (of float16 parameters), or uint8 with scales.
        master_weight_bits: 32: bfloat16 parameters have a remainder of 16 bits, which makes them exact float32
            weights, and float16 parameters a float32 master; 24: bfloat16 parameters have one of 8 bits.
        stochastic_rounding: round what is stored in bfloat16, and 24-bit weights, up or down with the probabilities
            that make the mean exact.
        seed: of stochastic rounding.
        cautious: decay only where that moves the parameter as the update does (https://arxiv.org/abs/2510.12402).
        decouple_lr: decay by weight_decay * lr / initial lr, as in the paper: a change of the learning rate does not
            change the decay at its top. The initial lr is the group's at construction, kept as "decay_lr".
        max_grad_norm: scale all gradients down so that their global norm is at most this, as
            `torch.nn.utils.clip_grad_norm_` does; in registers, without writing them. Read `grad_norm` for the norm.
        skip_nonfinite: skip a step whose global gradient norm is not finite: nothing is written, no step counted.
        skip_grad_norm_above: skip also a step with a larger global norm.
        statistics: make `update_norm` and `param_norm`.

    `max_grad_norm`, `skip_nonfinite`, `skip_grad_norm_above` and `statistics` are of the whole optimizer, attributes
    that may be changed between steps; all others are of a param group.

    Attributes:
        grad_norm: 0-d float64 tensor on the device of the first parameter: norm of all gradients (unscaled, before
            clipping) at the last step with gradients; None without an option that needs it. Every step writes it anew:
            clone what is to be kept.
        skipped_steps: 0-d int64 tensor there: steps that this object has skipped; a copy begins with 0.
        update_norm, param_norm: 0-d float64 tensors there, with `statistics`: norms of the change of all parameters
            with gradients at the last step that was not skipped, and of these parameters after it; both before
            rounding to their storage, from sums in float32.

    The optimizer reads none of these, so that nothing waits for the device before you do.

    Raises:
        ValueError: an option out of range or not supported, or a parameter whose elements share memory.
        TypeError: a parameter that is neither floating point nor complex.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = AdamW(model.parameters(), lr=1e-2)
        >>> model(torch.ones(3)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        exp_avg_dtype: torch.dtype | None = None,
        exp_avg_sq_dtype: torch.dtype | None = None,
        master_weight_bits: int | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        cautious: bool = False,
        decouple_lr: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        skip_grad_norm_above: float | None = None,
        statistics: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "exp_avg_dtype": exp_avg_dtype,
            "exp_avg_sq_dtype": exp_avg_sq_dtype,
            "master_weight_bits": master_weight_bits,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "cautious": cautious,
            "decouple_lr": decouple_lr,
        }
        check_hyper(defaults)
        check_implementation(defaults)
        self._limits = Limits(max_grad_norm, skip_nonfinite, skip_grad_norm_above)
        self._limits.check()
        if not isinstance(statistics, bool):
            raise ValueError(f"statistics must be True or False; got {statistics!r}")
        self.statistics = statistics
        self._plan: Plan | None = None
        self._controls: dict[torch.device, Control] = {}
        self._former_sums: Tensor | None = None  # statistics of the plan before this one
        self._graphs = graphs.Graphs()
        self._release: GradientRelease | None = None
        super().__init__(params, defaults)
        self._watch_state()
        self._compiled = CompiledStep(self)
        if not any(group["stochastic_rounding"] for group in self.param_groups):
            self._refuse_seed(seed)

    @staticmethod
    def _refuse_seed(seed: int) -> None:
        if seed != 0:
            raise ValueError(f"seed={seed} is of stochastic rounding; give it with stochastic_rounding=True")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with options of its own; refused like the arguments of the class."""
        if getattr(self, "_release", None) is not None:
            raise ValueError(
                "gradient release: remove() its handle before a param group is added, and register again after"
            )
        if isinstance(param_group, dict):
            options = {**self.defaults, **param_group}
            check_hyper(options)
            check_implementation(options)
            for name in (*Limits._fields, "statistics"):
                if name in param_group:
                    raise ValueError(
                        f"{name}={param_group[name]!r} of a param group: it is of the whole optimizer; "
                        f"give it to AdamW(...) itself"
                    )
        has_seed = isinstance(param_group, dict) and "seed" in param_group  # soon it has everything
        super().add_param_group(param_group)
        try:
            for param in self.param_groups[-1]["params"]:
                check_param(param)
            check_storage(self.param_groups[-1], self.param_groups[-1]["params"])
            if has_seed and not self.param_groups[-1]["stochastic_rounding"]:
                self._refuse_seed(self.param_groups[-1]["seed"])
            set_decay_lr(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._announce_amp_support()
        if "_compiled" in self.__dict__:  # not yet in the constructor
            self._compiled.list_params(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a gradient or state that does not fit its parameter, or a sparse gradient. Nothing
                has been written then.
            ValueError: options or parameters of a group that were changed to what its constructor refuses; likewise.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not torch.compiler.is_compiling():
            self._step()
        elif self._release is None:
            self._compiled.trace()
        return loss

    # Otherwise learning rate schedulers would wrap it in a function of a file that torch.compile refuses to trace; for
    # the same purpose as theirs, steps set _opt_called.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    @torch._disable_dynamo  # where torch.compile has given up on step, nothing in here should be compiled either
    def _step(self) -> None:
        self._opt_called = True
        if self._release is not None:
            self._release.refuse_scaling(self._frame()[0])
            self._release.say_once("step")
            return
        try:
            self._plan = self._step_plan(self._plan, self.param_groups)
        except BaseException:
            if not graphs.is_capturing():  # which has changed nothing
                self._plan = None
            raise

    def _step_plan(
        self,
        plan: Plan | None,
        groups: list[dict[str, Any]],
        *,
        only: Tensor | None = None,
        numbers: Mapping[int, int] | None = None,
    ) -> Plan:
        """Take a step with a plan, or with a new one where that does not fit."""
        scaling, frame = self._frame()
        now = (groups, self._watch_state(), frame)
        capturing = graphs.is_capturing()
        grads = None if plan is None else plan.gradients(*now, capturing=capturing)
        if capturing and (plan is None or grads is None or not plan.capturable):
            graphs.refuse(groups)
        if plan is None or grads is None:
            self._graphs.outdated("options, parameters, gradients or state were changed")
            former = [] if plan is None else plan.buckets
            with torch.inference_mode(False):  # state must outlive a step taken in inference mode
                plan = Plan(*now, only=only, numbers=numbers)
            if only is None:
                self._keep_statistics(former, plan.buckets)
            else:
                set_statistics(plan.buckets, statistics_of(former, only.device))
            if plan.capturable and only is None:
                self._graphs.watch(plan.params)
            grads = plan.gradients(*now)
            assert grads is not None, "a plan fits what it was just built from"
        plan.step(grads, self._limits, scaling, self._control_on, capturing=capturing)
        if capturing:
            # Gradients that are released in a graph are the graph's own.
            self._graphs.add(plan, plan.params, grads if only is None else [])
        return plan

    def _keep_statistics(self, former: list[Bucket], buckets: list[Bucket]) -> None:
        """Those of a former plan stay until a step of the new one is not skipped."""
        if self.statistics:
            sums = statistics_of(former, self._control().values.device)
            self._former_sums = self._former_sums if sums is None else sums
            set_statistics(buckets, self._former_sums)

    def _frame(self) -> tuple[Scaling, Frame]:
        # Set by torch.amp.GradScaler for the duration of a step.
        scaling = Scaling(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        return scaling, Frame.of(self._limits, scaling, statistics=self.statistics)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `torch.optim.Optimizer.zero_grad`; refused where a captured graph would go on with the old gradients."""
        if torch.compiler.is_compiling():
            if self._release is None:
                self._compiled.zero_grad(set_to_none)
            return
        if self._release is not None:
            self._release.say_once("zero_grad")
            return
        self._graphs.check_zero_grad(set_to_none)
        super().zero_grad(set_to_none)

    def forget_graphs(self) -> None:
        """Free what is kept for CUDA graphs that hold steps; they must not be replayed any more."""
        self._graphs.forget()

    def _control_on(self, device: torch.device) -> Control:
        if device not in self._controls:
            with torch.inference_mode(False):
                self._controls[device] = Control(device)
        return self._controls[device]

    @property
    def grad_norm(self) -> Tensor | None:
        return self._control().values[2] if self._limits.need_norm else None

    @property
    def skipped_steps(self) -> Tensor:
        return self._control().skipped

    def _control(self) -> Control:
        parts = [] if self._plan is None else self._plan.parts
        devices = (param.device for group in self.param_groups for param in group["params"])
        return self._control_on(parts[0].device if parts else next(devices, torch.device("cpu")))

    @property
    def update_norm(self) -> Tensor | None:
        return self._norm_of(0)

    @property
    def param_norm(self) -> Tensor | None:
        return self._norm_of(1)

    def _norm_of(self, which: int) -> Tensor | None:
        plan = self._plan if self._release is None else self._release
        if not self.statistics:
            return None
        sums = statistics_of([] if plan is None else plan.buckets, self._control().values.device)
        sums = self._former_sums if sums is None else sums
        return None if sums is None else sums[which].sqrt()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later `load_state_dict` needs, in the form of `torch.optim.AdamW.state_dict`."""
        packed = super().state_dict()
        packed["state"] = {
            key: dict(entries) if isinstance(entries, ParamState) else entries
            for key, entries in packed["state"].items()
        }
        return packed

    def torch_state_dict(self) -> dict[str, Any]:
        """The state as `torch.optim.AdamW.state_dict` has it, to be loaded there.

        8-bit moments become float32; master weights are left out, see `master_params`.
        """
        return checkpoint.torch_state_dict(self.param_groups, self.state_dict())

    @torch.no_grad()
    def master_params(self) -> list[Tensor]:
        """Copies of all parameters in the order of the param groups, in float32, exact where there are masters.

        Those of float64 and complex parameters have their dtype.
        """
        return [
            storage.master_weight(param, self.state.get(param, {})).clone(memory_format=torch.contiguous_format)
            for group in self.param_groups
            for param in group["params"]
        ]

    @torch.no_grad()
    def load_master_params(self, values: Iterable[Tensor]) -> None:
        """Set all parameters, and the masters of those that have one, from tensors like those of `master_params`.

        Raises:
            ValueError: another number of tensors, or other shapes. Nothing has been changed then.
        """
        owners = [(param, group) for group in self.param_groups for param in group["params"]]
        values = list(values)
        given, expected = [tuple(v.shape) for v in values], [tuple(param.shape) for param, _ in owners]
        if given != expected:
            raise ValueError(f"got tensors of shapes {given}; the parameters have {expected}")
        for (param, group), value in zip(owners, values, strict=True):
            entries = self.state.get(param, {})
            Policy.of(group).set_master(param, entries, value)
            if entries:
                self.state[param] = entries

    def state_bytes(self) -> StateBytes:
        """Memory of the optimizer's state, by the name of what is stored."""
        return StateBytes.of(self.param_groups, self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this optimizer, of any storage, or of any implementation of `torch.optim.AdamW`.

        It is converted to this optimizer's storage; moments for which that has no wish keep the floating-point
        dtypes they were saved in. Storage options, `foreach`, `fused`, `capturable` and `differentiable` stay as
        this optimizer was built; all other options come from the checkpoint.

        Raises:
            ValueError: groups, shapes or entries that do not match. Nothing has been changed then.
        """
        hook = self.register_load_state_dict_pre_hook(lambda _, given: checkpoint.prepare(self.param_groups, given))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_limits": self._limits, "statistics": self.statistics}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Also how Optimizer.load_state_dict installs what it has loaded.
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in (
                ("amsgrad", False),
                ("maximize", False),
                ("foreach", None),
                ("capturable", False),
                ("differentiable", False),
                ("fused", None),
                ("exp_avg_dtype", None),
                ("exp_avg_sq_dtype", None),
                ("master_weight_bits", None),
                ("stochastic_rounding", False),
                ("seed", 0),
                ("cautious", False),
                ("decouple_lr", False),
            ):
                group.setdefault(name, value)
            set_decay_lr(group)
        missing: dict[str, Any] = {
            "_limits": Limits(),
            "statistics": False,
            "_controls": {},
            "_graphs": graphs.Graphs(),
            "_release": None,
            "_former_sums": None,
        }
        self.__dict__.update({name: value for name, value in missing.items() if name not in self.__dict__})
        self._graphs.outdated("state was loaded")
        checkpoint.restore(self.param_groups, self.state)
        self._watch_state()
        self._plan = None
        if "_compiled" in self.__dict__:
            self._compiled.list_params(self)
        else:
            self._compiled = CompiledStep(self)
        self._announce_amp_support()

    def _watch_state(self) -> State:
        """The state, as a dict that notes changes even if somebody has assigned another."""
        state: Any = self.state
        if not isinstance(state, State):
            self.state = state = State(state)  # type: ignore[assignment]  # declared a defaultdict
        return state

    max_grad_norm = _limit("max_grad_norm")
    skip_nonfinite = _limit("skip_nonfinite")
    skip_grad_norm_above = _limit("skip_grad_norm_above")

    def _announce_amp_support(self) -> None:
        self._step_supports_amp_scaling = any(group["fused"] for group in self.param_groups)
