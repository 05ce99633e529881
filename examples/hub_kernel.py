"""The package as a kernel of the Hugging Face hub: write its layout, load it, and step beside the package.

python examples/hub_kernel.py [FOLDER]
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from adamw_triton.kernels import adamw

import adamw_triton
from kernels import get_local_kernel

BACKENDS = ("cpu", "cuda", "rocm")
PACKAGE, KERNELS = Path(adamw_triton.__file__).parent, Path(adamw.__file__).parent


def write(folder):
    """Write build/torch-<backend>/ for each backend: the package with its kernels inside, and metadata.json."""
    for backend in BACKENDS:
        variant = Path(folder) / "build" / f"torch-{backend}"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE, variant, ignore=ignored)
        if not (variant / "kernels").exists():  # a checkout has them beside the package
            shutil.copytree(KERNELS, variant / "kernels", ignore=ignored)
        metadata = {
            "id": f"adamw_triton_{backend}",
            "name": "adamw-triton",
            "version": 1,
            "license": "apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2))


def train(AdamW, device):
    torch.manual_seed(0)
    model = torch.nn.Linear(256, 128, device=device)
    optimizer = AdamW(model.parameters(), lr=1e-2, exp_avg_dtype="int8", exp_avg_sq_dtype="uint8", max_grad_norm=1.0)
    for _ in range(5):
        model(torch.randn(32, 256, device=device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def main(folder):
    write(folder)
    loaded = get_local_kernel(Path(folder))
    assert loaded.AdamW is not adamw_triton.AdamW
    device = "cuda" if torch.cuda.is_available() else "cpu"
    same = all(map(torch.equal, train(loaded.AdamW, device), train(adamw_triton.AdamW, device)))
    print(f"{loaded.__name__} beside adamw_triton: the same weights: {same}")
    assert same


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(scratch)
