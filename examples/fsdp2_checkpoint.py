"""FSDP2 with a checkpoint, from which any number of ranks resumes; 8-bit moments beside bf16 halves of fp32 weights.

torchrun --nproc-per-node 2 examples/fsdp2_checkpoint.py /tmp/run
torchrun --nproc-per-node 4 examples/fsdp2_checkpoint.py /tmp/run
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from adamw_triton import AdamW

STEPS = 10  # of each run


class Block(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def main(folder):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    mesh = init_device_mesh(device, (dist.get_world_size(),))

    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Block(128) for _ in range(2))).to(device, torch.bfloat16)
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    storage = {"master_weight_bits": 24, "exp_avg_dtype": "int8", "exp_avg_sq_dtype": "uint8"}
    optimizer = AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0, **storage)  # after fully_shard

    done = sorted(int(path.name.removeprefix("step-")) for path in Path(folder).glob("step-*") if path.suffix == "")
    first = done[-1] if done else 0
    if done:
        of_model, of_optimizer = get_state_dict(model, optimizer)
        dcp.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=f"{folder}/step-{first}")
        set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)

    loss = torch.tensor(0.0)
    for step in range(first, first + STEPS):
        generator = torch.Generator().manual_seed(step)  # the same batch on every rank, to keep this short
        inputs = torch.randn(16, 128, generator=generator).to(device, torch.bfloat16)
        loss = (model(inputs).float() - inputs.float().roll(1, -1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    # A checkpoint gets its name when it is whole: a save that dies costs nothing.
    last = first + STEPS
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=f"{folder}/step-{last}.part")
    dist.barrier()
    norm, held = optimizer.grad_norm.item(), optimizer.state_bytes()
    if dist.get_rank() == 0:
        Path(f"{folder}/step-{last}.part").rename(f"{folder}/step-{last}")
        print(
            f"steps {first} to {last} on {dist.get_world_size()} ranks: loss {loss.item():.4f}, "
            f"gradient norm {norm:.3f}, state {held.total} bytes of {held.global_total}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
