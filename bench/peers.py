"""The AdamW implementations that are compared: ours, torch's, and other packages'.

All step the same parameters with the same gradients and hyper-parameters. Those that keep moments as torch does
share them too, in the dtypes of the storage policy: there is memory for more of them then, and time does not
depend on the values. What a peer computes otherwise than torch.optim.AdamW in float32 is said in `differs`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adamw_triton import AdamW
from adamw_triton.storage import GROUP_SIZE, StorageOptions
from adamw_triton.storage.policies import Policy

from . import common
from .timing import Call

HYPER: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}

# torch.compile traces every tensor of a step on its own, and compiles them into one program: minutes beyond this.
MAX_COMPILED_TENSORS = 400

Moments = list[dict[str, Tensor]]


class Unavailable(Exception):
    """Why a peer cannot take part, in one line."""


class Stepper(Protocol):
    def step(self) -> Any: ...


@dataclass(frozen=True)
class Peer:
    """One implementation.

    Attributes:
        package: the distribution it comes from, as pip calls it.
        differs: what it computes otherwise than torch's fp32 AdamW.
        factory: makes an optimizer of parameters in the dtypes of a policy; `moments` to share, if it can.
        own_state: bytes per element of its state, or None if it shares moments.
        compiles: whether its first step takes many seconds.
    """

    name: str
    package: str
    differs: str
    factory: Callable[[Sequence[Tensor], Policy, Moments], Stepper]
    own_state: Callable[[Policy], float] | None = None
    compiles: bool = False

    @property
    def version(self) -> str | None:
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None


def single_shape(elements: int, policy: Policy) -> tuple[int, ...]:
    """Return the shape of one tensor whose moments are stored as the policy says.

    Raises:
        Unavailable: 8-bit moments, and a number of elements that has no rows of whole groups.
    """
    if elements % GROUP_SIZE == 0:
        return elements // GROUP_SIZE, GROUP_SIZE
    if not policy.exp_avg.is_floating_point:
        raise Unavailable(f"got {elements} elements; {policy.name} needs a multiple of {GROUP_SIZE}")
    return (elements,)


def problem(shapes: Sequence[tuple[int, ...]], policy: Policy, device: torch.device) -> tuple[list[Tensor], Moments]:
    """Random parameters with gradients, and zero moments, all in the dtypes of the policy."""
    params: list[Tensor] = []
    moments: Moments = []
    for shape in shapes:
        param = nn.Parameter(torch.randn(shape, dtype=policy.param, device=device))
        if policy.grad != policy.param:
            if not hasattr(param, "grad_dtype"):
                raise Unavailable(f"torch {torch.__version__} has no gradients of another dtype than the parameter's")
            param.grad_dtype = policy.grad
        # Between 1/2 and 3/2 in size: squares that every dtype can hold.
        sign = torch.randint(0, 2, shape, dtype=torch.int8, device=device).to(policy.grad).mul_(2).sub_(1)
        param.grad = torch.rand(shape, dtype=policy.grad, device=device).add_(0.5).mul_(sign)
        state: dict[str, Tensor] = {}
        with torch.no_grad():
            options = {**policy.options, "exp_avg_dtype": policy.exp_avg, "exp_avg_sq_dtype": policy.exp_avg_sq}
            StorageOptions.from_group({**options, "seed": 0}).complete(param, state, amsgrad=policy.amsgrad)
        del state["step"]
        params.append(param)
        moments.append(state)
    return params, moments


def start(peer: Peer, params: Sequence[Tensor], policy: Policy, moments: Moments) -> Stepper:
    """Make a peer's optimizer and take two steps: where it compiles, allocates, or refuses.

    Raises:
        Unavailable: the package is missing, or whatever else went wrong.
    """
    try:
        if peer.version is None:
            raise Unavailable(f"{peer.package} is not installed")
        stepper = peer.factory(params, policy, moments)
        for _ in range(2):  # the second may compile anew
            stepper.step()
        common.synchronize(params[0].device)
    except Unavailable:
        raise
    except Exception as error:  # of other people's code: anything
        lines = str(error).strip().splitlines()
        raise Unavailable(f"{type(error).__name__}: {lines[0] if lines else 'no message'}") from error
    return stepper


class Starter:
    """Starts peers, as long as those that compile have not used up their seconds."""

    def __init__(self, compile_seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.allowed = compile_seconds
        self.used = 0.0
        self.clock = clock

    def start(
        self, chosen: Sequence[Peer], params: Sequence[Tensor], policy: Policy, moments: Moments
    ) -> tuple[dict[str, Call], dict[str, str]]:
        """The step of each peer by name, and why there is none of the others."""
        if any(peer.compiles for peer in chosen):
            # Otherwise the ninth step function that a process compiles would silently run as it is.
            torch._dynamo.reset()
        steps: dict[str, Call] = {}
        errors: dict[str, str] = {}
        for peer in chosen:
            if peer.compiles and self.used > self.allowed:
                errors[peer.name] = f"not compiled: {self.allowed:g} s of compiling are used up; see --compile-seconds"
                continue
            begin = self.clock()
            try:
                steps[peer.name] = start(peer, params, policy, moments).step
            except Unavailable as error:
                errors[peer.name] = str(error)
            self.used += self.clock() - begin if peer.compiles else 0.0
        return steps, errors


def share(optimizer: Optimizer, params: Sequence[Tensor], moments: Moments, step_on_device: bool = False) -> None:
    for param, state in zip(params, moments, strict=True):
        step = torch.zeros((), device=param.device if step_on_device else "cpu")
        optimizer.state[param] = {"step": step, **state}


def _ours(foreach: bool | None) -> Callable[[Sequence[Tensor], Policy, Moments], Stepper]:
    def make(params: Sequence[Tensor], policy: Policy, moments: Moments) -> Stepper:
        optimizer = AdamW(params, **HYPER, **policy.options, foreach=foreach)
        share(optimizer, params, moments)
        return optimizer

    return make


def _torch(**form: Any) -> Callable[[Sequence[Tensor], Policy, Moments], Stepper]:
    def make(params: Sequence[Tensor], policy: Policy, moments: Moments) -> Stepper:
        require_floats(policy)
        optimizer = torch.optim.AdamW(params, **HYPER, amsgrad=policy.amsgrad, **form)
        share(optimizer, params, moments, step_on_device=form.get("fused", False))
        return optimizer

    return make


class _Compiled:
    def __init__(self, optimizer: Optimizer) -> None:
        self.step = torch.compile(optimizer.step)


def _compiled(params: Sequence[Tensor], policy: Policy, moments: Moments) -> Stepper:
    if len(params) > MAX_COMPILED_TENSORS:
        raise Unavailable(f"{len(params)} tensors; more than {MAX_COMPILED_TENSORS} take minutes to compile")
    require_floats(policy)
    if len(set(policy.dtypes)) > 1:
        raise Unavailable("the step that it compiles needs one dtype for parameters, gradients and moments")
    optimizer = torch.optim.AdamW(params, **HYPER, amsgrad=policy.amsgrad)
    share(optimizer, params, moments)
    return _Compiled(optimizer)


def require_floats(policy: Policy) -> None:
    if not policy.is_plain:
        raise Unavailable("has neither 8-bit moments nor master weights nor stochastic rounding")


def _require_plain_state(policy: Policy, *, amsgrad: bool = False, is_8bit: bool = False) -> None:
    if is_8bit and policy.exp_avg == torch.int8 and policy.exp_avg_sq == torch.uint8:
        return  # what it stores is of that kind, if not the same
    require_floats(policy)
    if policy.amsgrad and not amsgrad:
        raise Unavailable("has no amsgrad")
    if not policy.param == policy.exp_avg == policy.exp_avg_sq:
        raise Unavailable("chooses the dtype of its moments by the parameter's")


def _optimi(params: Sequence[Tensor], policy: Policy, moments: Moments) -> Stepper:
    _require_plain_state(policy)
    return import_module("optimi").AdamW(params, **HYPER, triton=True, kahan_sum=False)


def _flashoptim(*, quantize: bool) -> Callable[[Sequence[Tensor], Policy, Moments], Stepper]:
    def make(params: Sequence[Tensor], policy: Policy, moments: Moments) -> Stepper:
        _require_plain_state(policy, is_8bit=quantize)
        # It refuses master weights where all parameters are fp32, and warns where there are none and they are not.
        bits = 24 if quantize and policy.param != torch.float32 else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module("flashoptim").FlashAdamW(
                params, **HYPER, quantize=quantize, master_weight_bits=bits, fused=True
            )

    return make


def _torchao(params: Sequence[Tensor], policy: Policy, moments: Moments) -> Stepper:
    _require_plain_state(policy, amsgrad=True, is_8bit=True)
    return import_module("torchao.optim").AdamW8bit(params, **HYPER, amsgrad=policy.amsgrad)


OURS = "adamw_triton"
OURS_EACH = "adamw_triton foreach=False"
FUSED = "torch fused"

_ROUNDS_OFTEN = "below fp32 every operation rounds to the dtype of what it writes"

PEERS = [
    Peer(OURS, "adamw-triton", "", _ours(None)),
    Peer(OURS_EACH, "adamw-triton", "", _ours(False)),
    Peer("torch for-loop", "torch", _ROUNDS_OFTEN, _torch(foreach=False, fused=False)),
    Peer("torch foreach", "torch", f"{_ROUNDS_OFTEN}; temporaries", _torch(foreach=True)),
    Peer(FUSED, "torch", "", _torch(fused=True)),
    Peer("torch compile", "torch", "arithmetic of Inductor's kernels", _compiled, compiles=True),
    Peer(
        "torch-optimi",
        "torch-optimi",
        "moments are stored without their bias; decay and update round to the parameter's dtype; Kahan summation off",
        _optimi,
        own_state=lambda policy: 2 * policy.param.itemsize,
    ),
    Peer(
        "flashoptim",
        "flashoptim",
        "quantization and master weights off",
        _flashoptim(quantize=False),
        own_state=lambda policy: 2 * policy.param.itemsize,
    ),
    Peer(
        "flashoptim 8-bit",
        "flashoptim",
        "8-bit moments, one fp16 scale for 32; below fp32 also 8 bits for each parameter (24-bit master weights)",
        _flashoptim(quantize=True),
        own_state=lambda policy: 3.125,
    ),
    Peer(
        "torchao 8-bit",
        "torchao",
        "8-bit moments, one fp32 scale for 256, in tensors of a multiple of 256 and at least 4096 elements",
        _torchao,
        own_state=lambda policy: 2 + 2 * 4 / 256,
        compiles=True,
    ),
]
BY_NAME = {peer.name: peer for peer in PEERS}
