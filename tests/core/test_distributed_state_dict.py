"""`get_optimizer_state_dict` and `set_optimizer_state_dict`, in one process, between torch's AdamW and ours."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import bits
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from adamw_triton import AdamW

BF16 = torch.bfloat16
EIGHT_BITS = {"exp_avg_dtype": "int8", "exp_avg_sq_dtype": torch.uint8}
STORAGE = {
    "fp32": {},
    "amsgrad": {"amsgrad": True},
    "bf16 moments": {"exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": BF16},
    "cautious, decouple_lr": {"cautious": True, "decouple_lr": True},
    "8 bits": EIGHT_BITS,
    "masters of 32": {"master_weight_bits": 32},
    "masters of 24, 8 bits": {"master_weight_bits": 24, **EIGHT_BITS},
}
TORCH_HAS_ITS_NAMES = [name for name in STORAGE if "masters" not in name and "8 bits" not in name]
OPTIONS = {
    "as it is": {},
    "full": {"full_state_dict": True},
    "cpu_offload": {"cpu_offload": True},
    "full, cpu_offload": {"full_state_dict": True, "cpu_offload": True},
    "flattened": {"flatten_optimizer_state_dict": True},
}
pytestmark = [
    pytest.mark.parametrize("name", OPTIONS),
    # Of torch, which says that its own functions are deprecated, and that there is one process.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:torch.distributed is disabled:UserWarning"),
]


def trained(cls, storage, device, steps=3):
    """A model and its optimizer after some steps."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(128, 6), nn.LayerNorm(6), nn.Linear(6, 3)).to(device)
    model = model.to(BF16) if "masters" in storage else model
    options = dict(STORAGE[storage])
    if cls is torch.optim.AdamW:
        options = {name: value for name, value in options.items() if name == "amsgrad"}
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[1:].parameters()), "weight_decay": 0.0}]
    optimizer = cls(groups, lr=1e-2, **options)
    train(model, optimizer, steps)
    return model, optimizer


def train(model, optimizer, steps):
    for _ in range(steps):
        weight = model[0].weight
        model(torch.randn(4, 128, device=weight.device, dtype=weight.dtype)).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_go_on_alike(pairs, *, equal):
    for model, optimizer in pairs:
        torch.manual_seed(2)
        train(model, optimizer, 2)
    (one, _), (other, _) = pairs
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        if equal:
            assert torch.equal(bits(a), bits(b))
        else:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("storage", STORAGE)
def test_ours_to_ours_is_bit_for_bit(storage, name, device, tmp_path):
    options = StateDictOptions(**OPTIONS[name])
    model, optimizer = trained(AdamW, storage, device)
    fresh, target = trained(AdamW, storage, device, steps=0)
    hand_over(model, optimizer, fresh, target, options, tmp_path)
    assert target.group_options == optimizer.group_options
    assert_go_on_alike([(model, optimizer), (fresh, target)], equal=True)
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        for entry, value in optimizer.state[a].items():
            assert torch.equal(bits(value), bits(target.state[b][entry])), entry


@pytest.mark.parametrize("storage", TORCH_HAS_ITS_NAMES)
@pytest.mark.parametrize(("source", "target"), [(AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW)])
def test_between_torch_and_ours(source, target, storage, name, device, tmp_path):
    options = StateDictOptions(**OPTIONS[name])
    model, optimizer = trained(source, storage, device)
    fresh, loaded = trained(target, storage, device, steps=0)
    saved = copy.deepcopy(optimizer.state_dict()["state"])
    hand_over(model, optimizer, fresh, loaded, options, tmp_path)
    for index, entries in loaded.state_dict()["state"].items():
        for entry in ("step", "exp_avg", "exp_avg_sq"):
            value = entries[entry].float().cpu()
            # To what the narrower one holds.
            torch.testing.assert_close(value, saved[index][entry].float().cpu(), rtol=2.0**-8, atol=0)
    if storage in ("fp32", "amsgrad"):
        assert_go_on_alike([(model, optimizer), (fresh, loaded)], equal=False)
    elif storage.startswith("cautious") and target is AdamW:
        assert loaded.group_options[0]["cautious"], "of the instance, where the checkpoint says nothing"
    train(fresh, loaded, 1)


@pytest.mark.parametrize("storage", ["8 bits", "masters of 24, 8 bits"])
def test_codes_cannot_be_taken_for_moments(storage, name, device, tmp_path):
    """An optimizer with floats asks for names that the checkpoint does not have."""
    options = StateDictOptions(**OPTIONS[name])
    model, optimizer = trained(AdamW, storage, device)
    dcp.save(
        {"optim": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=tmp_path, no_dist=True
    )
    fresh, target = trained(AdamW, "fp32", device, steps=0)
    template = {"optim": get_optimizer_state_dict(fresh, target, options=options)}
    with pytest.raises((RuntimeError, dcp.api.CheckpointException), match="exp_avg"):
        dcp.load(template, checkpoint_id=tmp_path, no_dist=True)


def hand_over(model, optimizer, fresh, target, options, folder):
    """Save from one optimizer and load into the other."""
    dcp.save({"optim": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=folder, no_dist=True)
    state_dict = {"optim": get_optimizer_state_dict(fresh, target, options=options)}
    dcp.load(state_dict, checkpoint_id=folder, no_dist=True)
    set_optimizer_state_dict(fresh, target, state_dict["optim"], options=options)
    fresh.load_state_dict(model.state_dict())
