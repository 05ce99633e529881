"""torchtitan: an OptimizersContainer that knows this optimizer by name.

python examples/torchtitan_container.py

In a torchtitan configuration, set `optimizer=AdamWTritonContainer.Config(param_groups=[ParamGroupConfig(...)])`, and
the trainer's own `max_norm` to 0: the step clips.
"""

import torch
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from adamw_triton import AdamW


class AdamWTritonContainer(OptimizersContainer):
    @staticmethod
    def _resolve_optimizer_factory(name):
        return AdamW if name == "adamw_triton" else OptimizersContainer._resolve_optimizer_factory(name)


def config(**of_all):
    """Weights decay, biases do not; `of_all` are options of the whole optimizer."""
    common = {"lr": 3e-3, "betas": (0.9, 0.95), "exp_avg_dtype": "bfloat16"}
    return AdamWTritonContainer.Config(
        param_groups=[
            ParamGroupConfig(
                pattern=r"bias$", optimizer_name="adamw_triton", optimizer_kwargs={**common, "weight_decay": 0.0}
            ),
            ParamGroupConfig(
                pattern=r".*", optimizer_name="adamw_triton", optimizer_kwargs={**common, "weight_decay": 0.1}
            ),
        ],
        implementation="for-loop",  # "fused" is for GradScaler
        optimizer_factory_kwargs_by_name={"adamw_triton": of_all},
    )


def main():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 128), torch.nn.GELU(), torch.nn.Linear(128, 8))
    container = AdamWTritonContainer(config(max_grad_norm=1.0), model_parts=[model])
    inputs = torch.randn(64, 32)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.mse_loss(model(inputs), inputs[:, :8] * 2)
        loss.backward()
        container.step()
        container.zero_grad()
        losses.append(loss.item())
    (optimizer,) = container.optimizers
    saved = container.state_dict()  # flat, by the names of parameters
    before = [state["exp_avg"].clone() for state in optimizer.state.values()]
    container.load_state_dict(
        {name: value.clone() if torch.is_tensor(value) else value for name, value in saved.items()}
    )
    assert all(map(torch.equal, before, (state["exp_avg"] for state in optimizer.state.values())))
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}, gradient norm {optimizer.grad_norm.item():.3f}")
    assert losses[-1] < losses[0]


if __name__ == "__main__":
    main()
