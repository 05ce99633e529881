"""class AdamW: arguments, step, state dict."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from . import state_dict as state_dicts
from .grad_control import GradDecision, GradNormOptions, GradScalerInputs
from .group_options import OURS, GroupOptions, OptionsOfGroups
from .norm_attributes import NormAttributes
from .plan import Plan, StepInputs
from .rank_checks import check_no_fsdp1, check_norm_group, warn_if_replaced
from .sharding import local_entries
from .step_hooks import exclude_from_compilation, with_hooks
from .storage import StateBytes, StorageOptions
from .validation import check_group, check_hyperparams, check_implementation, refuse_seed

_DEFAULTS: dict[str, Any] = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}  # of options that older checkpoints lack


class AdamW(NormAttributes, Optimizer):
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
        capturable: True: a CUDA graph may hold whole steps. What shall change between replays (lr, betas,
            weight_decay) must be a 0-d tensor on the device then; a number is frozen into the graph.
        differentiable: only False.
        fused: True announces that `torch.amp.GradScaler` may leave unscaling to the step. The kernel is the
            same in any case.
        exp_avg_dtype: storage of m, a dtype or its name: float32, bfloat16, float16, or int8: codes with a float32
            scale for each 128 elements, of parameters whose rows (all after the first dimension) are multiples of 128
            elements, and float32 of all others. None: the parameter's dtype, or float32 with `master_weight_bits`.
        exp_avg_sq_dtype: storage of v: float32, bfloat16, float16 (of float16 parameters), or likewise uint8.
        master_weight_bits: 32: bfloat16 parameters have a remainder of 16 bits, which makes them exact float32
            weights, and float16 parameters a float32 master; 24: bfloat16 parameters have one of 8 bits.
        stochastic_rounding: round what is stored in bfloat16, 8-bit moments and 24-bit weights up or down with the
            probabilities that make the mean exact. None: with 8-bit moments, which otherwise stand still where they
            should shrink by less than half a code a step.
        seed: of stochastic rounding.
        cautious: decay only where that moves the parameter as the update does (https://arxiv.org/abs/2510.12402).
        decouple_lr: decay by weight_decay * lr / initial lr, as in the paper: a change of the learning rate does not
            change the decay at its top. The initial lr is the group's at construction.
        max_grad_norm: scale all gradients down so that their global norm is at most this, as
            `torch.nn.utils.clip_grad_norm_` does; in registers, without writing them. Read `grad_norm` for the norm.
        skip_nonfinite: skip a step whose global gradient norm is not finite: nothing is written, no step counted.
        skip_grad_norm_above: skip also a step with a larger global norm.
        statistics: make `update_norm` and `param_norm`.
        norm_group: a process group whose ranks have other parameters of the model, like stages of a pipeline: norms are
            over theirs too. What meshes of DTensors show needs none.

    `max_grad_norm`, `skip_nonfinite`, `skip_grad_norm_above`, `statistics` and `norm_group` (which no copy has) are of
    the whole optimizer, attributes that may be changed between steps; all others are of a param group, those that torch
    does not have in `group_options`.

    Attributes:
        grad_norm: 0-d float64 tensor on the device of the first parameter: norm of all gradients (unscaled, before
            clipping) at the last step with gradients, NaN before the first; None without an option that needs it.
        skipped_steps: 0-d int64 tensor there: steps that this object has skipped; a copy begins with 0.
        update_norm, param_norm: 0-d float64 tensors there, with `statistics`: norms of the change of all parameters
            with gradients at the last step that was not skipped, and of these parameters after it; both before
            rounding to their storage, from sums in float32.

    The optimizer reads none of these, so that nothing waits for the device before you do.

    Raises:
        ValueError: an option out of range or not supported. Parameters are checked when they have a gradient.

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
        exp_avg_dtype: torch.dtype | str | None = None,
        exp_avg_sq_dtype: torch.dtype | str | None = None,
        master_weight_bits: int | None = None,
        stochastic_rounding: bool | None = None,
        seed: int = 0,
        cautious: bool = False,
        decouple_lr: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        skip_grad_norm_above: float | None = None,
        statistics: bool = False,
        norm_group: Any = None,
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
            "decoupled_weight_decay": True,  # which tells torch.optim.Adam's checkpoints from AdamW's
        }
        options = {
            "exp_avg_dtype": exp_avg_dtype,
            "exp_avg_sq_dtype": exp_avg_sq_dtype,
            "master_weight_bits": master_weight_bits,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "cautious": cautious,
            "decouple_lr": decouple_lr,
        }
        check_hyperparams(defaults)
        check_implementation(defaults)
        self._norm_options = GradNormOptions(max_grad_norm, skip_nonfinite, skip_grad_norm_above)
        self._norm_options.check()
        if not isinstance(statistics, bool):
            raise ValueError(f"statistics must be True or False; got {statistics!r}")
        check_norm_group(norm_group)
        self.statistics, self.norm_group = statistics, norm_group
        self._options = OptionsOfGroups(GroupOptions().changed(options))
        self._reset()
        super().__init__(params, defaults)
        if not any(group["stochastic_rounding"] for group in self._groups):
            refuse_seed(seed)

    def _reset(self) -> None:
        """Begin without plans, decisions and counters."""
        exclude_from_compilation(AdamW, "_update")
        self._plans = [Plan()]
        self._looked_for_params = False
        self._decisions: dict[torch.device, GradDecision] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with options of its own; refused like the arguments of the class."""
        ours: dict[str, Any] = {}
        known = self._options.defaults
        if isinstance(param_group, dict):
            options = {**self.defaults, **param_group}
            check_hyperparams(options)
            check_implementation(options)
            for name in (*GradNormOptions._fields, "statistics", "norm_group"):
                if name in param_group:
                    raise ValueError(
                        f"{name}={param_group[name]!r} of a param group: it is of the whole optimizer; "
                        f"give it to AdamW(...) itself. ZeroRedundancyOptimizer, which gives each rank an AdamW for "
                        f"some of the parameters, cannot: call torch.nn.utils.clip_grad_norm_ before its step"
                    )
            if not options["decoupled_weight_decay"]:
                raise ValueError("decoupled_weight_decay=False is torch.optim.Adam; AdamW's weight decay is decoupled")
            if "decoupled_weight_decay" in param_group:  # it was a group before
                known = self._options.find(param_group)
            ours = {name: value for name, value in param_group.items() if name in OURS}
            if ours:  # which the caller's dict keeps
                param_group = {name: value for name, value in param_group.items() if name not in OURS}
        self._options.of(self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            its_options = known.changed(ours).with_decay_lr(group["lr"])
            check_group({**group, **its_options.resolved()}, seed_given="seed" in ours)
            check_no_fsdp1(group["params"], self._norm_options, statistics=self.statistics)
        except Exception:
            self.param_groups.pop()
            raise
        self._options.add(group, its_options)
        self._announce_amp_support()

    @property
    def group_options(self) -> list[dict[str, Any]]:
        """What each param group has of the options that torch.optim.AdamW does not have; copies, dtypes by name.

        To change one, write it to the group: `optimizer.param_groups[0]["cautious"] = True`. It is taken from there
        by the next step.
        """
        return [options.to_json() for options in self._options.of(self.param_groups)]

    @property
    def _groups(self) -> list[dict[str, Any]]:
        """The param groups with all their options."""
        return self._options.merged(self.param_groups)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a gradient or state that does not fit its parameter, a sparse gradient, or a tensor without
                memory of its own. Nothing has been written then.
            ValueError: options of a group that were changed to what its constructor refuses, or a parameter whose
                elements share memory; likewise.
            TypeError: a parameter of a dtype that cannot be optimized; likewise.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update(self._plans[0])
        return loss

    profile_hook_step = staticmethod(with_hooks)  # which torch wraps `step` in

    def _update(self, plan: Plan, group: int | None = None, param: Tensor | None = None) -> None:
        """Step all parameters, or one of a group."""
        if torch.is_inference_mode_enabled():  # which state must outlive
            with torch.inference_mode(False):
                return self._update(plan, group, param)
        groups = self._groups if group is None else [self._options.merged_with(self.param_groups, group, [param])]
        with torch.no_grad():
            had_grads = plan.step(groups, self.state, self._step_inputs())
        if not (had_grads or self.state or self._looked_for_params):
            self._looked_for_params = True
            warn_if_replaced([param for group in groups for param in group["params"]])

    def _step_inputs(self) -> StepInputs:
        # The scaler's are set by torch.amp.GradScaler for the duration of a step.
        scaler = GradScalerInputs(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        norms = self._norm_options, scaler, self.statistics, self.norm_group
        return StepInputs(*norms, self._home, self._decision_on)

    def forget_graphs(self) -> None:
        """Free what is kept for CUDA graphs that hold steps; they must not be replayed any more."""
        for plan in self._plans:
            plan.forget_captures()

    def torch_state_dict(self) -> dict[str, Any]:
        """The state as `torch.optim.AdamW.state_dict` has it, to be loaded there.

        8-bit moments become float32; master weights are left out, see `master_params`.
        """
        return state_dicts.torch_state_dict(self.state_dict())

    @torch.no_grad()
    def master_params(self) -> list[Tensor]:
        """Copies of all parameters in the order of the param groups, in float32, exact where there are masters.

        Those of float64 and complex parameters have their dtype; those of DTensors are DTensors.
        """
        return [
            state_dicts.master_param(param, self.state.get(param, {}))
            for group in self.param_groups
            for param in group["params"]
        ]

    @torch.no_grad()
    def load_master_params(self, values: Iterable[Tensor]) -> None:
        """Set all parameters, and the masters of those that have one, from tensors like those of `master_params`.

        Args:
            values: one for each parameter; of a DTensor one like it, or the whole of it on every rank.

        Raises:
            ValueError: another number of tensors, other shapes, or DTensors that lie otherwise than their parameters.
                Nothing has been changed then.
        """
        owners = [(param, group) for group in self._groups for param in group["params"]]
        values = list(values)
        given, expected = [tuple(v.shape) for v in values], [tuple(param.shape) for param, _ in owners]
        if given != expected:
            raise ValueError(f"got tensors of shapes {given}; the parameters have {expected}")
        values = [state_dicts.part_for(param, value) for (param, _), value in zip(owners, values, strict=True)]
        for (param, group), value in zip(owners, values, strict=True):
            entries = self.state.get(param, {})
            StorageOptions.from_group(group).set_master(*local_entries(param, entries), value)
            if entries:
                self.state[param] = entries

    def state_bytes(self) -> StateBytes:
        """Memory of the optimizer's state, by the name of what is stored."""
        return StateBytes.of(self._groups, self.state)

    def state_dict(self) -> dict[str, Any]:
        """The state with torch.optim.AdamW's keys in the groups, none of which holds more than numbers and names.

        `cautious` and `decouple_lr`, which change results, are saved as the value of "decoupled_weight_decay".
        """
        options = self._options.of(self.param_groups)
        return state_dicts.with_decay(options, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this optimizer, of any storage, or of any implementation of `torch.optim.AdamW`.

        It is converted to this optimizer's storage; moments for which that has no wish keep the floating-point
        dtypes they were saved in. Storage options, `foreach`, `fused`, `capturable` and `differentiable` stay as
        this optimizer was built; all other options come from the checkpoint, `cautious` and `decouple_lr` if they were
        set there.

        Raises:
            ValueError: groups, shapes or entries that do not match, or tensors without memory of their own. Nothing
                has been changed then.
        """
        options = self._options.of(self.param_groups)
        hook = self.register_load_state_dict_pre_hook(
            lambda _, given: state_dicts.pack(self.param_groups, options, given)
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        options = (self._options.defaults, list(self._options.of(self.param_groups)))
        ours = {"_norm_options": self._norm_options, "statistics": self.statistics, "_options": options}
        return {**super().__getstate__(), **ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Also how Optimizer.load_state_dict installs what it has loaded.
        state = dict(state)
        if "_options" in self.__dict__:
            defaults, known = self._options.defaults, self._options.of(self.param_groups)
        else:  # unpickled or copied
            defaults, known = state.pop("_options", (GroupOptions(), []))
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in _DEFAULTS.items():
                group.setdefault(name, value)
            group["decoupled_weight_decay"] = True
        if "_plans" not in self.__dict__:  # unpickled or copied
            self.__dict__.setdefault("_norm_options", GradNormOptions())
            self.__dict__.setdefault("statistics", False)
            self.norm_group = None
            self._reset()
        self._options = OptionsOfGroups(defaults)
        self._options.set(self.param_groups, known or [defaults] * len(self.param_groups))
        state_dicts.restore(self._groups, self.state)
        self._announce_amp_support()

    def _announce_amp_support(self) -> None:
        self._step_supports_amp_scaling = any(group["fused"] for group in self.param_groups)
