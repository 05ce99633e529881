"""Lightning: configure_optimizers, clipping by the optimizer, resume.

Lightning refuses `gradient_clip_val` with an optimizer that unscales by itself (`fused=True`, for 16-mixed): clip with
`max_grad_norm` instead, with every precision.

python examples/lightning_module.py
"""

import logging
import tempfile
import warnings

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

from adamw_triton import AdamW


class Regression(lightning.LightningModule):
    def __init__(self, half=False):
        super().__init__()
        self.half_precision = half
        self.model = torch.nn.Sequential(torch.nn.Linear(32, 128), torch.nn.GELU(), torch.nn.Linear(128, 8))

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self.model(inputs), targets)

    def configure_optimizers(self):
        # With 16-mixed, fused=True lets the step unscale gradients and skip overflows.
        return AdamW(self.parameters(), lr=3e-3, max_grad_norm=1.0, fused=self.half_precision or None)


def fit(precision, epochs, folder, resume=None):
    torch.manual_seed(0)
    inputs = torch.randn(256, 32)
    data = DataLoader(TensorDataset(inputs, inputs[:, :8] * 2), batch_size=32)
    trainer = lightning.Trainer(
        precision=precision, max_epochs=epochs, default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="auto",
    )  # fmt: skip
    module = Regression(half=precision == "16-mixed")
    trainer.fit(module, data, ckpt_path=resume)
    return trainer, module


def main():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    precisions = ["32-true", "bf16-mixed"] + ["16-mixed"] * torch.cuda.is_available()
    for precision in precisions:
        with tempfile.TemporaryDirectory() as folder:
            trainer, _ = fit(precision, 2, folder)
            trainer.save_checkpoint(f"{folder}/two.ckpt")
            _, four = fit(precision, 4, folder)
            _, resumed = fit(precision, 4, folder, resume=f"{folder}/two.ckpt")
        same = all(torch.equal(p, q) for p, q in zip(four.parameters(), resumed.parameters(), strict=True))
        norm = trainer.optimizers[0].grad_norm.item()
        print(f"{precision}: gradient norm {norm:.3f}, resumed to the same weights: {same}")
        assert same


if __name__ == "__main__":
    main()
