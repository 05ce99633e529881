"""In the workers: train the tiny GPT in a wrapper, and compare with torch's AdamW and with one process.

Three comparisons. With torch in the same wrapper, where torch has the storage and the feature. With one process that
trains on the whole batch, whose gradients are other sums of the same terms. And a replay: one process that is handed
the very gradients of the run, which leaves nothing but the optimizer.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from parts import Parts, indices_of_parts, local, on_first_rank, put_together
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from wrappers import WRAPPERS, Wrapped, batch, loss_of, make_model, wrap

from adamw_triton import AdamW, launch, register_gradient_release

BF16 = torch.bfloat16
STEPS = 2 if launch.INTERPRETED else 3  # the interpreter is slow
SPOILED = 1  # the step whose gradients are spoiled, with a feature that skips
# A large eps: where gradients are mere noise of their sums, so would the updates be otherwise.
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1}
EIGHT_BITS = {"exp_avg_dtype": "int8", "exp_avg_sq_dtype": "uint8"}
BF16_MOMENTS = {"exp_avg_dtype": BF16, "exp_avg_sq_dtype": BF16}


@dataclass(frozen=True)
class Storage:
    """A dtype of the parameters, and options of the optimizer."""

    param: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_stochastic(self) -> bool:
        """Whether it rounds stochastically, which is the default with 8 bits."""
        return self.options.get("stochastic_rounding", "int8" in self.options.values())


STORAGES = {
    "fp32": Storage(),
    "bf16": Storage(BF16),
    "bf16-moments": Storage(options=BF16_MOMENTS),
    "8-bit": Storage(options=EIGHT_BITS),
    "8-bit-nearest": Storage(options={**EIGHT_BITS, "stochastic_rounding": False}),
    "master32": Storage(BF16, {"master_weight_bits": 32}),
    "master24-8-bit": Storage(BF16, {"master_weight_bits": 24, **EIGHT_BITS}),
    "bf16-stochastic": Storage(BF16, {"stochastic_rounding": True}),
}
# Without kernels torch's fused step takes parameters all of whose tensors have one dtype: of these storages some have.
# It rounds otherwise in whole vectors than in the elements left at the end, so that equal steps differ by a unit where
# shards begin elsewhere.
STEPPED_BY_TORCH = ("fp32", "bf16", "8-bit", "8-bit-nearest")

# Options of ours; those that torch has too; and what a training loop with torch does instead.
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "cautious": {"cautious": True},
    "statistics": {"statistics": True},
    "max_grad_norm": {"max_grad_norm": 0.5},
    "skip_nonfinite": {"skip_nonfinite": True},
    "skip_grad_norm_above": {"skip_grad_norm_above": 50.0, "max_grad_norm": 0.5, "statistics": True},
    "scaler": {},
    "scaler-fused": {"fused": True},
    "release": {},
}
TORCH_HAS_IT = ("plain", "amsgrad", "maximize", "scaler")
TORCH_CLIPS = ("ddp", "zero", "fsdp2", "fsdp2-bf16", "fsdp2-offload", "hsdp")  # not what is on several meshes
SPOILS = {"skip_nonfinite": math.inf, "skip_grad_norm_above": 1e3, "scaler": math.inf, "scaler-fused": math.inf}


@dataclass
class Run:
    """What is left of a training.

    Attributes:
        start: the whole parameters before.
        end: after, on the first rank.
        losses: at each step of this rank's part of the batch; on the first rank in the end of the whole.
        grads: that each step got, but under gradient release and of flat shards; whole on the first rank in the end.
        norms: grad_norm after each step.
        statistics: update_norm and param_norm at the end.
        skipped: number of steps.
    """

    start: list[Tensor]
    end: list[Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    grads: list[list[Tensor]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    statistics: tuple[float, float] | None = None
    skipped: int = 0


def make_optimizer(name: str, cls: type, params: list[nn.Parameter], options: dict[str, Any]) -> Any:
    if name == "zero":
        from torch.distributed.optim import ZeroRedundancyOptimizer  # whose import warns, but not in the workers

        return ZeroRedundancyOptimizer(params, optimizer_class=cls, **options)
    return cls(params, **options)


class Scaler:
    """torch.amp.GradScaler, or nothing."""

    def __init__(self, enabled: bool) -> None:
        self._scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=enabled)
        self._scaler.scale(torch.zeros(1))  # which makes what step() reads

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()

    def step(self, optimizer: Any) -> None:
        self._scaler.step(optimizer)
        self._scaler.update()


def spoil(param: nn.Parameter, factor: float) -> None:
    """Multiply one element of the gradient, which a single shard has."""
    grad = param.grad
    owns = True
    if isinstance(grad, DTensor):
        at = grad.device_mesh.get_coordinate()
        sharded = [i for i, placement in enumerate(grad.placements) if not placement.is_replicate()]
        owns = all(at[i] == grad.device_mesh.size(i) - 1 for i in sharded)
    if owns:
        local(grad).view(-1)[-1] = factor


def train(name: str, cls: type, storage: str, feature: str, foreach: bool | None) -> Run:
    """Train in a wrapper."""
    dtype = STORAGES[storage].param
    wrapped, run = wrap(name, dtype), Run([param.detach() for param in make_model(dtype).parameters()])
    clips = FEATURES[feature].get("max_grad_norm")
    options = {**OPTIONS, "foreach": foreach, **STORAGES[storage].options, **FEATURES[feature]}
    if cls is not AdamW:
        options.pop("max_grad_norm", None)
    optimizer = make_optimizer(name, cls, wrapped.params, options)
    if feature == "release":
        register_gradient_release(wrapped.model, optimizer)
    scaler = Scaler(feature.startswith("scaler"))
    for step in range(STEPS):
        loss = loss_of(wrapped.model, wrapped.part_of(batch(step)))
        scaler.backward(loss)
        run.losses.append(loss.item())
        if step == SPOILED and feature in SPOILS:
            spoil(wrapped.params[wrapped.index_of("block.v.weight")], SPOILS[feature])
        if feature != "release" and not name.startswith("fsdp1"):
            run.grads.append([part_of_grad(param).clone() for param in wrapped.params])
        if clips is not None and cls is not AdamW:
            nn.utils.clip_grad_norm_(wrapped.params, clips)
        scaler.step(optimizer)
        note(optimizer, run)
        optimizer.zero_grad()
    gather(name, wrapped, run)
    return run


def part_of_grad(param: nn.Parameter) -> Tensor:
    """This rank's part of the gradient, laid out as the parameter is: those of sequence parallel norms are sums."""
    grad = param.grad
    if isinstance(grad, DTensor) and grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return local(grad)


def gather(name: str, wrapped: Wrapped, run: Run) -> None:
    """Put together on the first rank what each rank has a part of."""
    if name == "one":
        run.end = [param.detach() for param in wrapped.params]
        return
    if name.startswith("fsdp1"):
        run.end = wrapped.full_params()
        run.losses = [sum(of_step) / len(of_step) for of_step in zip(*on_first_rank(run.losses), strict=True)]
        return
    indices = indices_of_all_ranks(name)
    lists = [*run.grads, [local(param.detach()) for param in wrapped.params]]
    of_ranks = on_first_rank((run.losses, torch.cat([part.flatten() for of_list in lists for part in of_list])))
    if of_ranks:
        losses, flat = zip(*of_ranks, strict=True)
        run.losses = [sum(of_step) / len(of_step) for of_step in zip(*losses, strict=True)]
        *run.grads, run.end = put_together(flat, indices, [value.shape for value in run.start])


@functools.cache
def indices_of_all_ranks(name: str) -> list[Parts]:
    return on_first_rank(indices_of_parts(make_model(), WRAPPERS[name]))


def note(optimizer: Any, run: Run) -> None:
    """Write down what our optimizer tells after a step."""
    if not isinstance(optimizer, AdamW):
        return
    if optimizer.grad_norm is not None:
        run.norms.append(optimizer.grad_norm.item())
    run.skipped = int(optimizer.skipped_steps)
    if optimizer.statistics:
        run.statistics = optimizer.update_norm.item(), optimizer.param_norm.item()


def replay(run: Run, storage: str, feature: str, foreach: bool | None) -> Run:
    """Hand the gradients of a run to an optimizer of plain parameters."""
    again = Run(run.start)
    params = [nn.Parameter(value.clone()) for value in run.start]
    optimizer = AdamW(params, **{**OPTIONS, "foreach": foreach, **STORAGES[storage].options, **FEATURES[feature]})
    scaler = Scaler(feature.startswith("scaler"))
    for grads in run.grads:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        scaler.step(optimizer)
        note(optimizer, again)
    again.end = [param.detach() for param in params]
    return again


@functools.cache
def trained_by_one(storage: str, feature: str) -> Run:
    """One process; without the gradient release, which changes when a step is taken and not which."""
    return train("one", AdamW, storage, "plain" if feature == "release" else feature, None)


def largest_difference(one: Run, other: Run) -> float:
    pairs = zip(one.end, other.end, strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def relative_difference(run: Run, reference: Run) -> float:
    """Length of the difference of all parameters, as a part of the way from start to end."""
    difference, way = 0.0, 0.0
    for end, expected, start in zip(run.end, reference.end, reference.start, strict=True):
        difference += (end.double() - expected.double()).square().sum().item()
        way += (expected.double() - start.double()).square().sum().item()
    return math.sqrt(difference / way)


def compare(wrapper: str, storage: str, feature: str, foreach: bool | None, alone: bool) -> dict[str, Any]:
    """Train in a wrapper and otherwise.

    Returns:
        What happened, and on the first rank differences by what they are against.
    """
    run = train(wrapper, AdamW, storage, feature, foreach)
    others: dict[str, Run] = {}
    torch_can = feature in TORCH_HAS_IT or (feature == "max_grad_norm" and wrapper in TORCH_CLIPS)
    if storage == "fp32" and torch_can:
        others["torch"] = train(wrapper, torch.optim.AdamW, storage, feature, foreach=False)
    if feature == "release":
        others["without release"] = train(wrapper, AdamW, storage, "plain", foreach)
    found = {key: getattr(run, key) for key in ("norms", "statistics", "skipped")}
    if dist.get_rank() != 0:
        return found
    if alone:
        others["one"] = trained_by_one(storage, feature)
    if run.grads and not (wrapper == "zero" and STORAGES[storage].is_stochastic):
        others["replay"] = replay(run, storage, feature, foreach)
    found["losses"] = run.losses
    for against, other in others.items():
        found[against] = {
            "largest": largest_difference(run, other),
            "relative": relative_difference(run, other),
            **{key: getattr(other, key) for key in ("losses", "norms", "statistics", "skipped")},
        }
    return found
