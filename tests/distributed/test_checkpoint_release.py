"""Checkpoints under gradient release: there is state to save or load before the first step."""

from checkpoints import contents, load, save
from handmade import changed
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor
from training import OPTIONS, STORAGES
from wrappers import batch, loss_of, wrap

from adamw_triton import AdamW, register_gradient_release

NAMES = ("fp32", "master24-8-bit")


class Released:
    """The tiny GPT under FSDP2, stepped by its backward pass."""

    def __init__(self, storage, **options):
        self.wrapped = wrap("fsdp2", STORAGES[storage].param)
        self.optimizer = AdamW(self.wrapped.params, **{**OPTIONS, **STORAGES[storage].options, **options})
        self.handle = register_gradient_release(self.wrapped.model, self.optimizer)
        self.run = self.wrapped.model, self.optimizer

    def train(self, first, last):
        for step in range(first, last):
            loss_of(self.wrapped.model, self.wrapped.part_of(batch(step))).backward()


def make_state():
    """By storage: what that changes in the model and the groups, and what is wrong after it."""
    found = {}
    for storage in NAMES:
        released = Released(storage)
        before = contents(released.run)
        state_dict = get_optimizer_state_dict(*released.run)
        after = contents(released.run)
        named = dict(released.wrapped.model.named_parameters())
        found[storage] = {
            "changed": changed(before, {name: value for name, value in after.items() if ": " not in name}),
            "lr": [group["lr"] for group in released.optimizer.param_groups if group["lr"] != OPTIONS["lr"]],
            "gradients": [name for name, param in named.items() if param.grad is not None],
            "without state": sorted(named.keys() - state_dict["state"].keys()),
            "not a DTensor": [
                f"{name}: {entry}"
                for name, entries in state_dict["state"].items()
                for entry, value in entries.items()
                if entry != "step" and not isinstance(value, DTensor)
            ],
            "not 0": [
                name
                for name, value in after.items()
                if "exp_avg" in name and "codes" not in name and value.count_nonzero()
            ],
        }
    return found


def test_state_is_made_without_a_trace(world2):
    for found in world2.run(make_state):
        assert found.keys() == set(NAMES)
        for storage, faults in found.items():
            assert all(names == [] for names in faults.values()), (storage, faults)


def resume(folder):
    """Two steps, saved, loaded before any step; names of what differs after two more."""
    runs = {storage: Released(storage) for storage in NAMES}
    for released in runs.values():
        released.train(0, 2)
    save({storage: released.run for storage, released in runs.items()}, "as it is", folder)
    fresh = {storage: Released(storage, lr=0.5) for storage in NAMES}
    load({storage: released.run for storage, released in fresh.items()}, "as it is", folder)
    found = {}
    for storage in NAMES:
        runs[storage].train(2, 4)
        fresh[storage].train(2, 4)
        found[storage] = changed(contents(runs[storage].run), contents(fresh[storage].run))
    return found


def test_resumed_before_any_step(world2, tmp_path):
    assert world2.run(resume, folder=str(tmp_path)) == 2 * [{storage: [] for storage in NAMES}]
