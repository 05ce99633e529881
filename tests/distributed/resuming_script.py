"""Training on sharded parameters that ends as if nothing had happened, however often its processes die.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --standalone --nproc-per-node 2 --max-restarts 3 resuming_script.py FOLDER

Without that variable torch 2.13 hands the addresses of dead processes to the next attempt, which may not start then.
A checkpoint is written under another name, and gets its own when all ranks have written all of it: whatever has such a
name is whole. Every attempt goes on from the last one.
"""

import shutil
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from adamw_triton import AdamW

STEPS, SAVE_EVERY, KEEP = 6, 2, 2


def state_of(model: nn.Module, optimizer: AdamW) -> dict:
    """All that a resumed run needs; a learning rate scheduler, a data loader and random states belong here too."""
    return {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}


def whole_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that can be loaded, the last one at the end."""
    return sorted(folder.glob("step-*[0-9]"), key=lambda path: int(path.name.removeprefix("step-")))


def save(folder: Path, step: int, model: nn.Module, optimizer: AdamW) -> None:
    """Write a checkpoint; the ones before it stay until it is whole."""
    part = folder / f"step-{step}.part"
    dcp.save(state_of(model, optimizer), checkpoint_id=part)
    if dist.get_rank() == 0:
        part.rename(folder / f"step-{step}")
        for old in whole_checkpoints(folder)[:-KEEP]:
            shutil.rmtree(old)
    dist.barrier()


def resume(folder: Path, model: nn.Module, optimizer: AdamW) -> int:
    """Load the last checkpoint, if there is one. Returns the number of steps taken so far."""
    if dist.get_rank() == 0:
        for part in folder.glob("*.part"):
            shutil.rmtree(part)
    dist.barrier()
    checkpoints = whole_checkpoints(folder)
    if not checkpoints:
        return 0
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=checkpoints[-1])
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"])
    return int(checkpoints[-1].name.removeprefix("step-"))


def train(folder: Path, after_step: Callable[[int], None] = lambda step: None) -> int:
    """Train to the end. Returns the step that it began at."""
    torch.manual_seed(0)  # the same weights on every rank
    model = nn.Sequential(nn.Linear(128, 31), nn.Tanh(), nn.Linear(31, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = AdamW(model.parameters(), lr=1e-2, exp_avg_dtype="int8", exp_avg_sq_dtype="uint8")
    first = resume(folder, model, optimizer)
    for step in range(first, STEPS):
        # Data by the number of the step, so that a resumed run sees what it would have seen.
        generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
        inputs = torch.randn(16, 128, generator=generator)
        (model(inputs) - inputs.sin().sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % SAVE_EVERY == 0:
            save(folder, step + 1, model, optimizer)
        after_step(step + 1)
    return first


def main() -> None:
    # A rank whose peers are gone does not wait for ever.
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    first = train(Path(sys.argv[1]))
    print(f"rank {dist.get_rank()} has trained from step {first}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
