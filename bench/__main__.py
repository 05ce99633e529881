"""`python -m bench [command] [options]`."""

from __future__ import annotations

import sys

from . import module_of

# Each is a module of this package with a `main(argv)` that returns the exit status.
COMMANDS = {
    "train": "train a small GPT with torch's AdamW and with ours, and compare (the default)",
    "static": "what the kernels compile to, and what follows for GPUs that need not be here",
    "arithmetic": "error of the kernel's square root and division, by emulation",
    "accuracy": "what storage costs in accuracy: training curves, errors of the update, gradients hard to store",
    "host": "time of step() on the host, for 10 to 10,000 tensors",
    "dist": "time of step() on the host, on parameters sharded by FSDP2",
    "cpu": "time of a step of parameters on the CPU, as offloading trainers take it",
    "throughput": "bytes per second of one tensor's step, next to copies of as many bytes (GPU)",
    "models": "one step on the parameter lists of real models, ours and every peer's (GPU)",
    "tune": "a sweep of block sizes, warps and cache hints, which checks the fixed configurations (GPU)",
    "suite": "static, arithmetic, host, dist, cpu, throughput and models, as far as this machine can, into one JSON",
    "plot": "draw a result",
    "compare": "ratios between two results, with their spread",
    "report": "one HTML page of a result: conditions, plots, tables, differences to another result",
    "docs": "write the tables of the README and of docs/ from results, or check that they agree",
}


def main(argv: list[str]) -> int:
    if argv[:1] in (["-h"], ["--help"]):
        print("commands (each has --help; train needs no name):")
        print("".join(f"  {name:<12}{purpose}\n" for name, purpose in COMMANDS.items()))
    command, argv = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("train", argv)
    if command not in COMMANDS:
        print(f"python -m bench: error: unknown command {command!r}; allowed: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        module = module_of(command)
    except ModuleNotFoundError as error:
        if error.name not in ("jinja2", "matplotlib", "rich"):
            raise
        print(f"python -m bench: error: {error.name} is missing; pip install 'adamw-triton[bench]'", file=sys.stderr)
        return 2
    return module.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
