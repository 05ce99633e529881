"""Step time and memory on paper, of models larger than any machine here; nothing of it was measured.

Of each GPU, which is the first of those that FSDP2 shards over:

    parameters   those of its shard: ceil(dim 0 / GPUs) rows of every tensor
    memory       parameters, gradients and state, in bytes for each parameter
    step         bytes that a step reads and writes / nominal bandwidth
    clipped      the same with the norm of all gradients, and what clipping needs besides
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from adamw_triton.storage.policies import BY_NAME, Policy

from . import shapes
from .codegen.devices import DEVICES, Device
from .shapes import Shape

H100: Device = next(device for device in DEVICES if device.key == "h100")
GB = 1e9


class Cluster(NamedTuple):
    """A model and the GPUs that it is sharded over."""

    name: str
    listed: Callable[[], list[Shape]]
    gpus: int


class Storage(NamedTuple):
    """What a step is of, and how its gradients are clipped."""

    name: str
    policy: Policy
    clips_in_step: bool = True


CLUSTERS = (
    Cluster("Llama 3 70B", shapes.llama3_70b, 64),
    Cluster("Llama 3 405B", shapes.llama3_405b, 1024),
)
STORAGES = (
    Storage("torch.optim.AdamW, fp32, mixed precision of FSDP2", BY_NAME["fp32"], clips_in_step=False),
    Storage("adamw_triton, fp32, mixed precision of FSDP2", BY_NAME["fp32"]),
    Storage("adamw_triton, bf16 with 16-bit remainder, fp32 moments", BY_NAME["bf16-master32"]),
    Storage("adamw_triton, bf16 with 8-bit remainder, 8-bit moments", BY_NAME["bf16-master24-8bit-stochastic"]),
)


class Row(NamedTuple):
    """What a storage costs on one GPU of a cluster; memory in GB, times in milliseconds."""

    parameters: float
    gradients: float
    state: float
    step: float
    clipped: float

    @property
    def memory(self) -> float:
        return self.parameters + self.gradients + self.state


def held_bytes(policy: Policy) -> tuple[float, float, float]:
    """Bytes per parameter that stay between steps: of the parameter, its gradient, and its state."""
    return policy.param.itemsize, policy.grad.itemsize, policy.state_bytes


def clip_bytes(storage: Storage) -> int:
    """Bytes per parameter that clipping adds to a step: gradients are read for their norm, then perhaps scaled.

    `clip_grad_norm_` reads and writes them again, whatever the norm; ours scales them where the step reads them.
    """
    grad = storage.policy.grad.itemsize
    return grad if storage.clips_in_step else 3 * grad


def row(storage: Storage, parameters: int, device: Device = H100) -> Row:
    """Costs of a GPU that has so many parameters."""
    policy = storage.policy
    moved = policy.bytes_per_element
    params, grads, state = (size * parameters / GB for size in held_bytes(policy))
    return Row(
        params,
        grads,
        state,
        step=device.memory_seconds(moved * parameters) * 1e3,
        clipped=device.memory_seconds((moved + clip_bytes(storage)) * parameters) * 1e3,
    )


def shard_elements(cluster: Cluster) -> int:
    """Parameters of the first GPU, which has the most."""
    return shapes.elements(shapes.shard(cluster.listed(), cluster.gpus))


def bytes_table() -> tuple[list[str], list[list[str]]]:
    """Bytes for each parameter: headings and rows."""
    headings = ["bytes per parameter", "parameter", "gradient", "state", "together", "read", "written", "a step"]
    rows = []
    for storage in STORAGES:
        policy = storage.policy
        sizes = held_bytes(policy)
        moved = (policy.read_bytes, policy.written_bytes, policy.bytes_per_element)
        clip = f"{policy.bytes_per_element + clip_bytes(storage):.4g}"
        rows.append([storage.name, *(f"{size:.4g}" for size in (*sizes, sum(sizes), *moved)), clip])
    return [*headings, "with clipping"], rows


def cluster_table(cluster: Cluster) -> tuple[list[str], list[list[str]]]:
    """Memory and times of one GPU: headings and rows."""
    headings = [f"{cluster.name} on {cluster.gpus} GPUs", "parameters, GB", "gradients", "state", "together"]
    rows = []
    for storage in STORAGES:
        made = row(storage, shard_elements(cluster))
        memory = (made.parameters, made.gradients, made.state, made.memory)
        times = (made.step, made.clipped)
        rows.append([storage.name, *(f"{size:.2f}" for size in memory), *(f"{ms:.2f}" for ms in times)])
    return [*headings, "step, ms", "with clipping"], rows


def arithmetic(cluster: Cluster) -> list[str]:
    """The first row of a cluster's table in full: one line for each quantity."""
    whole, mine = shapes.elements(cluster.listed()), shard_elements(cluster)
    storage = STORAGES[0]
    policy = storage.policy
    made = row(storage, mine)
    held = sum(held_bytes(policy))
    moved, clipped = policy.bytes_per_element, policy.bytes_per_element + clip_bytes(storage)
    bandwidth = f"{H100.bandwidth / 1e12:g}e12 B/s"
    return [
        f"{cluster.name}: {whole:,} parameters; the first of {cluster.gpus} GPUs has {mine:,} of them",
        f"memory: {mine:,} × {held:g} B = {made.memory:.2f} GB",
        f"step: {mine:,} × {moved:g} B / {bandwidth} = {made.step:.2f} ms",
        f"with clipping: {mine:,} × {clipped:g} B / {bandwidth} = {made.clipped:.2f} ms",
    ]


def sections() -> Sequence[tuple[list[str], list[list[str]], list[str]]]:
    """All tables, each with the lines that go below it."""
    made: list[tuple[list[str], list[list[str]], list[str]]] = [(*bytes_table(), [])]
    made += [(*cluster_table(cluster), arithmetic(cluster)) for cluster in CLUSTERS]
    return made
