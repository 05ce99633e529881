"""Accelerate: prepare, accumulate, save_state and load_state; where grad_norm is.

python examples/accelerate_loop.py
"""

import tempfile

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from adamw_triton import AdamW


def main():
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 128), torch.nn.GELU(), torch.nn.Linear(128, 8))
    inputs = torch.randn(512, 32)
    data = DataLoader(TensorDataset(inputs, inputs[:, :8] * 2), batch_size=16)
    # Clip here or with accelerator.clip_grad_norm_, not with both.
    model, optimizer, data = accelerator.prepare(model, AdamW(model.parameters(), lr=3e-3, max_grad_norm=1.0), data)
    losses = []
    for inputs, targets in data:
        with accelerator.accumulate(model):
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    ours = optimizer.optimizer  # what Accelerate has wrapped
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        before = [state["exp_avg"].clone() for state in ours.state.values()]
        for state in ours.state.values():
            state["exp_avg"].zero_()
        accelerator.load_state(folder)
    assert all(map(torch.equal, before, (state["exp_avg"] for state in ours.state.values())))
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}, gradient norm {ours.grad_norm.item():.3f}")
    assert losses[-1] < losses[0]


if __name__ == "__main__":
    main()
