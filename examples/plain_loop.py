"""A training loop: warm-up and cosine schedule, clipping, bad gradients skipped, checkpoint and resume.

python examples/plain_loop.py
"""

import tempfile
from pathlib import Path

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from adamw_triton import AdamW, param_groups_weight_decay

STEPS = 60


def build(device):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.GELU(), torch.nn.Linear(256, 8)).to(device)
    groups = param_groups_weight_decay(model, 0.1)  # biases and norms do not decay
    optimizer = AdamW(groups, lr=3e-3, betas=(0.9, 0.95), max_grad_norm=1.0, skip_nonfinite=True)
    warmup = LinearLR(optimizer, start_factor=0.1, total_iters=10)
    scheduler = SequentialLR(optimizer, [warmup, CosineAnnealingLR(optimizer, STEPS - 10)], milestones=[10])
    return model, optimizer, scheduler


def batch(step, device):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(64, 32, generator=generator)
    return inputs.to(device), (inputs[:, :8] > 0).float().to(device)


def train(model, optimizer, scheduler, steps, device):
    loss = torch.tensor(0.0)
    for step in steps:
        inputs, targets = batch(step, device)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(inputs), targets)
        loss.backward()
        optimizer.step()  # norm, clipping, skipping and update; nothing waits for the device
        optimizer.zero_grad()
        scheduler.step()
    return loss.item()


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, optimizer, scheduler = build(device)
    train(model, optimizer, scheduler, range(STEPS // 2), device)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        torch.save({name: part.state_dict() for name, part in parts.items()}, path)
        loss = train(*parts.values(), range(STEPS // 2, STEPS), device)

        resumed = dict(zip(parts, build(device), strict=True))
        for name, state in torch.load(path, weights_only=True).items():
            resumed[name].load_state_dict(state)
        again = train(*resumed.values(), range(STEPS // 2, STEPS), device)
    print(
        f"loss {loss:.4f}, resumed {again:.4f}, gradient norm {optimizer.grad_norm.item():.3f}, "
        f"{int(optimizer.skipped_steps)} steps skipped"
    )
    assert loss == again and loss < 0.5


if __name__ == "__main__":
    main()
