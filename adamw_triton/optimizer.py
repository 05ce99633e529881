"""class AdamW: arguments, state, step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from . import checkpoint, storage
from .checks import check_hyper, check_implementation, check_param, check_storage
from .plan import Plan
from .scalars import Hyper
from .state import ParamState, State
from .storage import Policy, StateBytes


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
        weight_decay: :math:`\lambda`, multiplied by the learning rate as in PyTorch, unlike the paper's.
        amsgrad: divide by the maximum of all v so far (https://openreview.net/forum?id=ryQu7f-RZ).
        maximize: ascend instead of descend.
        foreach: True: one launch for all tensors that share dtypes; False: one for each tensor; None: one
            for all, unless there is only one.
        capturable: only False.
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
        }
        check_hyper(defaults)
        check_implementation(defaults)
        self._plan: Plan | None = None
        super().__init__(params, defaults)
        self._watch_state()
        if not any(group["stochastic_rounding"] for group in self.param_groups):
            self._refuse_seed(seed)

    @staticmethod
    def _refuse_seed(seed: int) -> None:
        if seed != 0:
            raise ValueError(f"seed={seed} is of stochastic rounding; give it with stochastic_rounding=True")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with options of its own; refused like the arguments of the class."""
        if isinstance(param_group, dict):
            options = {**self.defaults, **param_group}
            check_hyper(options)
            check_implementation(options)
        has_seed = isinstance(param_group, dict) and "seed" in param_group  # soon it has everything
        super().add_param_group(param_group)
        try:
            for param in self.param_groups[-1]["params"]:
                check_param(param)
            check_storage(self.param_groups[-1], self.param_groups[-1]["params"])
            if has_seed and not self.param_groups[-1]["stochastic_rounding"]:
                self._refuse_seed(self.param_groups[-1]["seed"])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._announce_amp_support()

    @torch._disable_dynamo  # under torch.compile, a graph break: nothing here could be fused with anything
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
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "step() cannot be captured in a CUDA graph: the step count lives on the host. "
                "Capture forward and backward, and call step() outside of the graph."
            )

        # Set by torch.amp.GradScaler for the duration of this call.
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        state = self._watch_state()
        hypers = list(map(Hyper.of, self.param_groups))
        now = (self.param_groups, hypers, state)
        skippable = found_inf is not None

        plan = self._plan
        grads = None if plan is None else plan.gradients(*now, skippable=skippable)
        if plan is None or grads is None:
            self._plan = None
            with torch.inference_mode(False):  # state must outlive a step taken in inference mode
                self._plan = plan = Plan(*now, skippable=skippable)
            grads = plan.gradients(*now, skippable=skippable)
            assert grads is not None, "a plan fits what it was just built from"
        plan.step(grads, hypers, grad_scale, found_inf)
        return loss

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
            ):
                group.setdefault(name, value)
        checkpoint.restore(self.param_groups, self.state)
        self._watch_state()
        self._plan = None
        self._announce_amp_support()

    def _watch_state(self) -> State:
        """The state, as a dict that notes changes even if somebody has assigned another."""
        state: Any = self.state
        if not isinstance(state, State):
            self.state = state = State(state)  # type: ignore[assignment]  # declared a defaultdict
        return state

    def _announce_amp_support(self) -> None:
        self._step_supports_amp_scaling = any(group["fused"] for group in self.param_groups)
