"""What `models --with` adds to the comparison: the step together with what a training loop does around it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adamw_triton import AdamW, register_gradient_release
from adamw_triton.storage.policies import Policy

from . import peers
from .timing import Call
from .trainer import Features, Loop

NAMES = ("clip", "amp", "graph", "release")
IN_BACKWARD = "torch fused in backward"
RELEASED = "adamw_triton in backward"
EXPLAINED = {
    "clip": "torch: clip_grad_norm_ before the step",
    "amp": "both: GradScaler.step and update; torch's fused step writes the unscaled gradients back",
    "graph": "host and wall are those of a replay",
    "release": "backward pass, step and zero_grad; added_bytes is where gradients show",
}


def combination(text: str) -> tuple[str, ...]:
    """Names joined by "+": features that are measured together."""
    names = tuple(text.split("+"))
    unknown = [name for name in names if name not in NAMES]
    if unknown or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: {', '.join(NAMES)}, or several joined by +")
    if "release" in names and len(names) > 1:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; allowed: release alone, which has no gradients to clip or scale"
        )
    if {"amp", "graph"} <= set(names):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: amp or graph, GradScaler.update reads on the host")
    return names


def combinations(text: str) -> list[tuple[str, ...]]:
    return [combination(part) for part in text.split(",")]


def starters(
    names: Sequence[str], params: Sequence[Tensor], policy: Policy, moments: peers.Moments, device: torch.device
) -> dict[str, Callable[[], Call]]:
    """Of each provider by name: makes its call, or raises Unavailable."""
    if "graph" in names and device.type != "cuda":
        raise peers.Unavailable("CUDA graphs need a GPU")
    if "release" in names:
        return _released(params, policy, moments)
    features = Features(1.0 if "clip" in names else None, amp="amp" in names, capturable="graph" in names)

    def start(optimizer: Optimizer, *, folded: bool) -> Call:
        model = nn.ParameterList(params)
        loop = Loop(optimizer, model, features, device, folded=folded, init_scale=1.0)
        if loop.scaler is not None:
            loop.scaler.scale(torch.ones((), device=device))  # where it allocates its tensors
        return _captured(loop.step) if "graph" in names else loop.step

    return {
        peers.OURS: lambda: start(_ours(params, policy, moments, features), folded=True),
        peers.FUSED: lambda: start(_fused(params, policy, moments, capturable=features.capturable), folded=False),
    }


def _ours(params: Sequence[Tensor], policy: Policy, moments: peers.Moments, features: Features) -> AdamW:
    optimizer = AdamW(params, **peers.HYPER, **policy.options, **features.options)
    peers.share(optimizer, params, moments)
    return optimizer


def _fused(
    params: Sequence[Tensor], policy: Policy, moments: peers.Moments, *, capturable: bool = False
) -> torch.optim.AdamW:
    peers.require_floats(policy)
    optimizer = torch.optim.AdamW(params, **peers.HYPER, amsgrad=policy.amsgrad, fused=True, capturable=capturable)
    peers.share(optimizer, params, moments, step_on_device=True)
    return optimizer


def _captured(step: Call) -> Call:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _released(params: Sequence[Tensor], policy: Policy, moments: peers.Moments) -> dict[str, Callable[[], Call]]:
    for param in params:
        param.grad = None

    def backward() -> None:
        torch.autograd.backward([param.sum() for param in params])

    def plain(optimizer: Optimizer) -> Call:
        def call() -> None:
            backward()
            optimizer.step()
            optimizer.zero_grad()

        return call

    def ours_in_backward() -> Call:
        optimizer = _ours(params, policy, moments, Features())
        handle = register_gradient_release(nn.ParameterList(params), optimizer)
        # Parameters belong to all providers: outside of its own calls this one only lets gradients accumulate.
        inactive = ExitStack()
        inactive.enter_context(handle.accumulate())

        def call(optimizer: AdamW = optimizer) -> None:  # with which the release would end
            inactive.close()
            backward()
            inactive.enter_context(handle.accumulate())

        return call

    def torch_in_backward() -> Call:
        each = {p: _fused([p], policy, [moment]) for p, moment in zip(params, moments, strict=True)}
        active = False

        def step(param: Tensor) -> None:
            if active:
                each[param].step()
                each[param].zero_grad()

        for param in params:
            param.register_post_accumulate_grad_hook(step)

        def call() -> None:
            nonlocal active
            active = True
            backward()
            active = False

        return call

    return {
        RELEASED: ours_in_backward,
        IN_BACKWARD: torch_in_backward,
        peers.OURS: lambda: plain(_ours(params, policy, moments, Features())),
        peers.FUSED: lambda: plain(_fused(params, policy, moments)),
    }


def start_all(
    names: Sequence[str], params: Sequence[Tensor], policy: Policy, moments: peers.Moments, device: torch.device
) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls by provider, each made twice already, and why there is none of the others."""
    calls: dict[str, Call] = {}
    errors: dict[str, str] = {}
    for name, make in starters(names, params, policy, moments, device).items():
        started = _start(make)
        (errors if isinstance(started, str) else calls)[name] = started  # type: ignore[index,assignment]
    return calls, errors


def _start(make: Callable[[], Call]) -> Call | str:
    """The call, made twice already, or why there is none."""
    try:
        call = make()
        for _ in range(2):
            call()
    except (peers.Unavailable, RuntimeError, ValueError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return call
