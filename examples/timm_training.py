"""timm: in its registry, so that `--opt adamw_triton` finds it, and with its param groups.

python examples/timm_training.py
"""

import timm
import torch
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry

from adamw_triton import AdamW


def register():
    """Call this before timm's create_optimizer."""
    default_registry.register(
        OptimInfo(name="adamw_triton", opt_class=AdamW, description="AdamW in one Triton kernel", has_betas=True)
    )


def main():
    register()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=4).to(device)
    optimizer = create_optimizer_v2(model, "adamw_triton", lr=1e-3, weight_decay=0.05, max_grad_norm=1.0)
    assert isinstance(optimizer, AdamW) and len(optimizer.param_groups) == 2
    images, labels = torch.randn(16, 3, 32, 32, device=device), torch.arange(16, device=device) % 4
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}, gradient norm {optimizer.grad_norm.item():.3f}")
    assert losses[-1] < losses[0]


if __name__ == "__main__":
    main()
