"""In the workers and in the pytest process: train, save and resume sharded models with gradients made by hand."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from handmade import DEALS, OPTIONS, Layers, changed, parts_of, set_grads, values
from parts import local
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from training import BF16, BF16_MOMENTS, STORAGES, Storage

from adamw_triton import AdamW, launch

STORED: dict[str, Storage] = {
    "fp32": STORAGES["fp32"],
    "amsgrad": Storage(options={"amsgrad": True, "cautious": True}),
    "bf16-moments": STORAGES["bf16-moments"],
    "8-bit": STORAGES["8-bit"],
    "bf16-stochastic": STORAGES["bf16-stochastic"],
    "master32-bf16-amsgrad": Storage(BF16, {"master_weight_bits": 32, **BF16_MOMENTS, "amsgrad": True}),
    "master24-8-bit": STORAGES["master24-8-bit"],
}
# Without kernels, parameters of these are stepped as torch does it, which rounds otherwise at the end of a shard: the
# same bits on the same shards only. All others, and with kernels these too, are the same bits on any.
STEPPED_BY_TORCH = ("fp32", "amsgrad", "8-bit")
# These have every kind of entry: floats of 32 and 16 bits, codes, scales, remainders of 16 and 8 bits.
ALL_ENTRIES = ("master32-bf16-amsgrad", "master24-8-bit")
FORMS: dict[str, dict[str, bool]] = {
    "as it is": {},
    "cpu_offload": {"cpu_offload": True},
    "full": {"full_state_dict": True},
    "full, cpu_offload": {"full_state_dict": True, "cpu_offload": True},
    "flattened": {"flatten_optimizer_state_dict": True},
}
SAVED_AT, END = 2, 4
Run = tuple[nn.Module, Any]


def build(
    deal: str, storage: str, *, fresh: bool = False, cls: type = AdamW, options: dict[str, Any] | None = None
) -> Run:
    """A sharded model and its optimizer, of two groups.

    Args:
        fresh: all that a checkpoint brings is other than it is.
        options: instead of those of the storage.
    """
    dtype = STORED[storage].param
    model = Layers().to(dtype)
    for param, value in zip(model.parameters(), values(9 if fresh else 0, dtype), strict=True):
        param.data.copy_(value)
    DEALS[deal](model)
    params = list(model.parameters())
    groups = [
        {"params": [param for param in params if param.dim() > 1]},
        {"params": [param for param in params if param.dim() <= 1], "weight_decay": 0.5 if fresh else 0.0},
    ]
    hyperparams = {"lr": 0.5, "betas": (0.1, 0.2)} if fresh else OPTIONS
    return model, cls(groups, **{**hyperparams, **(STORED[storage].options if options is None else options)})


def train(deal: str, run: Run, first: int, last: int) -> None:
    """Steps with gradients made by hand, the same numbers in any deal."""
    model, optimizer = run
    params = list(model.parameters())
    for step in range(first, last):
        set_grads(deal, params, values(1 + step, params[0].dtype))
        optimizer.step()
        optimizer.zero_grad()


def entries_of(run: Run) -> dict[str, Tensor]:
    """The parameters and their state, by name."""
    model, optimizer = run
    found = {}
    for name, param in model.named_parameters():
        found[name] = param.detach()
        found.update({f"{name}: {entry}": value for entry, value in optimizer.state.get(param, {}).items()})
    return found


def contents(run: Run) -> dict[str, Tensor]:
    """Copies of what this rank has of these."""
    return {name: local(value).clone() for name, value in entries_of(run).items()}


def settings(run: Run) -> list[Any]:
    """All else that a resumed run has in common with the undisturbed one."""
    names = ("lr", "eps", "weight_decay", "amsgrad")
    numbers = [[*group["betas"], *(group[name] for name in names)] for group in run[1].param_groups]
    return [numbers, run[1].group_options, run[1].state_bytes()]


def undisturbed(deal: str, storage: str) -> tuple[dict[str, Tensor], list[Any]]:
    """Contents and settings at the end."""
    return _undisturbed(deal, storage, launch.has_kernels(torch.device("cpu")))


@functools.cache
def _undisturbed(deal: str, storage: str, has_kernels: bool) -> tuple[dict[str, Tensor], list[Any]]:
    run = build(deal, storage)
    train(deal, run, 0, END)
    return contents(run), settings(run)


def note_parts(deal: str, runs: Mapping[str, Run], folder: str) -> None:
    """Write down what this rank has, and where that is in the whole; the oracle of what is loaded."""
    noted = {}
    for storage, run in runs.items():
        entries = entries_of(run)
        indices = {name: torch.arange(value.numel()).view(value.shape) for name, value in entries.items()}
        at = parts_of(deal, indices)
        noted[storage] = {name: (value.shape, at[name], local(value)) for name, value in entries.items()}
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.save(noted, f"{folder}/rank-{rank}.pt")


def noted_whole(folder: str) -> dict[str, dict[str, Tensor]]:
    """Put together what all ranks have written down, by storage."""
    whole: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for file in Path(folder).glob("rank-*.pt"):
        for storage, entries in torch.load(file).items():
            for name, (shape, at, part) in entries.items():
                flat = whole[storage].setdefault(name, torch.zeros(shape, dtype=part.dtype)).view(-1)
                flat[at.flatten()] = part.flatten()
    return whole


def get(run: Run, form: str) -> dict[str, Any]:
    options = StateDictOptions(**FORMS[form])
    model, optimizer = run
    return {
        "model": get_model_state_dict(model, options=options),
        "optim": get_optimizer_state_dict(model, optimizer, options=options),
    }


def put(run: Run, form: str, state_dict: dict[str, Any]) -> None:
    # Of what is whole and offloaded, only the first rank has something.
    from_rank_0 = form == "full, cpu_offload" and dist.is_initialized()
    options = StateDictOptions(**FORMS[form], broadcast_from_rank0=from_rank_0)
    model, optimizer = run
    set_model_state_dict(model, state_dict["model"], options=options)
    set_optimizer_state_dict(model, optimizer, state_dict["optim"], options=options)


def save(runs: dict[str, Run], form: str, folder: str) -> None:
    """All runs into one checkpoint."""
    state_dict = {storage: get(run, form) for storage, run in runs.items()}
    dcp.save(state_dict, checkpoint_id=folder, no_dist=not dist.is_initialized())


def load(runs: dict[str, Run], form: str, folder: str) -> None:
    state_dict = {storage: get(run, form) for storage, run in runs.items()}
    dcp.load(state_dict, checkpoint_id=folder, no_dist=not dist.is_initialized())
    for storage, run in runs.items():
        put(run, form, state_dict[storage])


def train_and_save(deal: str, folder: str, storages: Mapping[str, Sequence[str]]) -> None:
    """Save to folders by the name of the form.

    Args:
        storages: those to save, for each form.
    """
    runs = {storage: build(deal, storage) for storage in dict.fromkeys(chain.from_iterable(storages.values()))}
    for run in runs.values():
        train(deal, run, 0, SAVED_AT)
    note_parts(deal, runs, folder)
    for form, its_storages in storages.items():
        save({storage: runs[storage] for storage in its_storages}, form, f"{folder}/{form}")


def resume(
    deal: str, form: str, folder: str, storages: Sequence[str], *, same_shards: bool = False
) -> dict[str, list[str]]:
    """Load and go on to the end. Names, by storage, of what differs from what was saved and from an undisturbed run."""
    runs = {storage: build(deal, storage, fresh=True) for storage in storages}
    load(runs, form, f"{folder}/{form}")
    saved, found = noted_whole(folder), {}
    for storage, run in runs.items():
        differences = [f"{name}, loaded" for name in changed(parts_of(deal, saved[storage]), contents(run))]
        train(deal, run, SAVED_AT, END)
        end, its_settings = undisturbed(deal, storage)
        is_rounded = storage in STEPPED_BY_TORCH and not same_shards and not launch.has_kernels(torch.device("cpu"))
        differences += changed(end, contents(run), 2.0**-22 if is_rounded else 0.0)
        differences += [] if settings(run) == its_settings else ["settings"]
        found[storage] = differences
    return found
