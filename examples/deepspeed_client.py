"""DeepSpeed: as the client optimizer, with ZeRO stage 1.

deepspeed examples/deepspeed_client.py    # or `python`, for one process

DeepSpeed's stages flatten parameters, keep fp32 masters of their own and clip by themselves: leave `max_grad_norm` and
`master_weight_bits` out here, and set `gradient_clipping` in its configuration.
"""

import os

import deepspeed
import torch

from adamw_triton import AdamW

CONFIG = {
    "train_micro_batch_size_per_gpu": 16,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,  # DeepSpeed's name for every optimizer but its own
}


def main():
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 128), torch.nn.GELU(), torch.nn.Linear(128, 8))
    optimizer = AdamW(model.parameters(), lr=3e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    inputs = torch.randn(16, 32, dtype=torch.bfloat16, device=engine.device)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.mse_loss(engine(inputs), inputs[:, :8] * 2)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
    assert losses[-1] < losses[0]


if __name__ == "__main__":
    main()
