"""State of DTensors: how it lies, how much there is of it, and how it gets there."""

import copy

import pytest
import torch
from handmade import (
    SHARDED_GROUPS,
    changed,
    local_contents,
    make,
    names,
    parts_of,
    refusal,
    rounding,
    set_grads,
    steps,
    values,
)
from parts import full, local
from torch.distributed.tensor import DTensor, Partial, Replicate

from adamw_triton.storage import GROUP_SIZE

DEALS = [pytest.param(f"world{size}", deal, id=f"{deal}x{size}") for deal, size in SHARDED_GROUPS]


def faults_of(param, name, entry):
    """What is wrong with how an entry of a DTensor's state lies."""
    if name == "step":
        return [] if type(entry) is torch.Tensor and entry.dim() == 0 else ["not a plain number"]
    shape, stride, placements = tuple(param.shape), param.stride(), param.placements
    if name.endswith("_scale"):
        shape = shape[0], shape[1] // GROUP_SIZE
        stride = shape[1], 1
    elif name == "param_remainder" and entry.dtype == torch.uint8:
        shape, stride = (*shape, 2), (*(2 * s for s in stride), 1)
    checks = {
        "class": isinstance(entry, DTensor),
        "mesh": entry.device_mesh == param.device_mesh,
        "placements": entry.placements == placements,
        "shape": tuple(entry.shape) == shape,
        "stride": entry.stride() == stride,
        "local shape": local(entry).shape[: param.dim() - 1] == local(param).shape[: param.dim() - 1],
        "requires_grad": not entry.requires_grad,
    }
    if not name.endswith("_scale"):
        checks["local numbers"] = local(entry).shape[: param.dim()] == local(param).shape
    return [what for what, is_right in checks.items() if not is_right]


def form_of_state(deal, storage):
    """Faults of all entries, which entries there are, and of how many the local part is empty."""
    amsgrad = {} if "8-bit" in storage else {"amsgrad": True}
    params, optimizer = make(deal, storage, **amsgrad)
    steps(deal, params, optimizer, 0, 1)
    faults, kinds, n_empty = {}, set(), 0
    for label, param in zip(names(), params, strict=True):
        for name, entry in optimizer.state[param].items():
            kinds.add(name)
            if isinstance(param, DTensor):
                faults[f"{label}: {name}"] = faults_of(param, name, entry)
                n_empty += name != "step" and local(entry).numel() == 0
            else:
                faults[f"{label}: {name}"] = ["a DTensor"] if isinstance(entry, DTensor) else []
    return {what: found for what, found in faults.items() if found}, len(faults), kinds, n_empty


ENTRIES = {
    "fp32": {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    "master32": {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "param_remainder"},
    "master24-8-bit": {
        *("step", "exp_avg", "exp_avg_sq", "param_remainder"),
        *("exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_scale"),
    },
}


@pytest.mark.parametrize("storage", ENTRIES)
@pytest.mark.parametrize(("world", "deal"), DEALS, indirect=["world"])
def test_state_lies_as_its_parameter(world, deal, storage):
    results = world.run(form_of_state, deal=deal, storage=storage)
    for faults, n_entries, kinds, _ in results:
        assert faults == {}
        assert kinds == ENTRIES[storage] and n_entries >= 4 * len(names())
    if "fsdp2" in deal and deal != "tp-fsdp2":
        assert results[-1][3] >= 3, "no empty shard: the last rank has nothing of the parameter of one element"


def bytes_of_state(deal, storage):
    """What state_bytes() says, what there is on this rank, and the whole."""
    params, optimizer = make(deal, storage)
    steps(deal, params, optimizer, 0, 1)
    told = optimizer.state_bytes()
    entries = [value for param in params for value in optimizer.state[param].values()]
    found = sum(local(value).numel() * value.element_size() for value in entries)
    whole = sum(value.numel() * value.element_size() for value in entries)
    return told.total, found, told.global_total, whole, str(told)


@pytest.mark.fast
@pytest.mark.parametrize("storage", ["fp32", "master24-8-bit"])
def test_bytes_of_this_rank_and_of_all(world2, storage):
    results = world2.run(bytes_of_state, deal="fsdp2", storage=storage)
    alone = world2.run(bytes_of_state, deal="plain", storage=storage)[0]
    counts = 4 * len(names())  # which every rank has
    for told, found, told_of_all, whole, text in results:
        assert told == found < told_of_all == whole == alone[0]
        assert f"{told:,}" in text and f"{told_of_all:,}" in text
    assert sum(told - counts for told, *_ in results) == alone[0] - counts


def load_whole_state(deal, storage):
    """Two steps in one process, its state dict loaded on shards, one more step; names of what differs."""
    others, alone = make("plain", storage)
    steps("plain", others, alone, 0, 2)
    params, optimizer = make(deal, storage, [full(param) for param in others])
    optimizer.load_state_dict(copy.deepcopy(alone.state_dict()))
    steps(deal, params, optimizer, 2, 3)
    steps("plain", others, alone, 2, 3)
    expected = parts_of(deal, local_contents(others, alone))
    return changed(local_contents(params, optimizer), expected, rounding(storage))


@pytest.mark.parametrize(
    ("world", "storage"),
    [
        *(("world2", storage) for storage in ("fp32", "bf16-moments", "master32", "master24-8-bit")),
        ("kernels2", "bf16-moments"),
    ],
    indirect=["world"],
)
def test_whole_state_is_dealt_out_when_it_is_loaded(world, storage):
    assert world.run(load_whole_state, deal="fsdp2", storage=storage) == [[], []]


def load_own_state(deal, storage):
    """Two steps, the state dict loaded into another optimizer, one more step; names of what differs."""
    params, optimizer = make(deal, storage)
    steps(deal, params, optimizer, 0, 2)
    others, other = make(deal, storage, [full(param) for param in params])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(deal, params, optimizer, 2, 3)
    steps(deal, others, other, 2, 3)
    return changed(local_contents(others, other), local_contents(params, optimizer))


@pytest.mark.parametrize(("world", "deal"), DEALS, indirect=["world"])
def test_own_state_dict_is_loaded_as_it_is(world, deal):
    for storage in ("fp32", "master24-8-bit"):
        assert world.run(load_own_state, deal=deal, storage=storage) == world.size * [[]]


def load_what_does_not_fit():
    """Errors, and names of what they changed."""
    params, optimizer = make("fsdp2")
    steps("fsdp2", params, optimizer, 0, 1)
    others, alone = make("plain")
    steps("plain", others, alone, 0, 1)
    before = local_contents(others, alone)
    errors = [refusal(alone.load_state_dict, copy.deepcopy(optimizer.state_dict()))]
    return errors, changed(before, local_contents(others, alone))


def test_sharded_state_of_plain_parameters_is_refused(world2):
    for errors, names_changed in world2.run(load_what_does_not_fit):
        (error,) = errors
        assert error is not None and "DTensor" in error and "set_optimizer_state_dict" in error
        assert names_changed == []


def masters(deal):
    """The whole masters after two steps, and again after they were loaded into another optimizer."""
    params, optimizer = make(deal, "master32")
    steps(deal, params, optimizer, 0, 2)
    first = [full(master) for master in optimizer.master_params()]
    _, other = make(deal, "master32", values(9, torch.bfloat16))
    other.load_master_params(optimizer.master_params())
    again = [full(master) for master in other.master_params()]
    _, third = make(deal, "master32", values(9, torch.bfloat16))
    third.load_master_params(first)
    return first, again, [full(master) for master in third.master_params()]


def test_masters_of_shards(world2):
    expected = world2.run(masters, deal="plain")[0][0]
    for results in world2.run(masters, deal="fsdp2"):
        for found in results:
            assert all(map(torch.equal, found, expected))


def other_placements(deal):
    """Gradients that lie otherwise on the parameters' mesh; names of what differs from one process."""
    params, optimizer = make(deal)
    others, alone = make("plain")
    for step in range(2):
        grads = values(1 + step, torch.float32)
        set_grads("plain", others, grads)
        for param, grad in zip(params, grads, strict=True):
            if not isinstance(param, DTensor):
                param.grad = grad
                continue
            # Every rank has the whole: the first time as it is, then as a sum that is still to be made.
            spread = DTensor.from_local(grad.clone(), param.device_mesh, [Replicate()] * param.device_mesh.ndim)
            if step == 1:
                is_first = not any(param.device_mesh.get_coordinate())
                part = grad.clone() if is_first else torch.zeros_like(grad)
                spread = DTensor.from_local(part, param.device_mesh, [Partial()] * param.device_mesh.ndim)
            param.grad = spread
        optimizer.step()
        alone.step()
    expected = parts_of(deal, local_contents(others, alone))
    return changed(local_contents(params, optimizer), expected, rounding("fp32"))


@pytest.mark.parametrize(("world", "deal"), DEALS, indirect=["world"])
def test_gradients_with_other_placements_are_redistributed(world, deal):
    assert world.run(other_placements, deal=deal) == world.size * [[]]
