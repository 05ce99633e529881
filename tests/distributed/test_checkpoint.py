"""Checkpoints of torch.distributed.checkpoint: saved on some ranks, resumed on as many, fewer or more, bit for bit."""

import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import (
    ALL_ENTRIES,
    END,
    FORMS,
    SAVED_AT,
    STORED,
    build,
    get,
    load,
    note_parts,
    resume,
    train,
    train_and_save,
)
from parts import full
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

from adamw_triton import launch
from adamw_triton.storage import moment

# Said by torch where there is one process.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
STORAGES_OF = {form: ALL_ENTRIES if options else tuple(STORED) for form, options in FORMS.items()}


@pytest.fixture
def eager(monkeypatch):
    """This process takes the steps that the workers of world2 and world4 take."""
    monkeypatch.setattr(launch, "has_kernels", lambda device: False)


@pytest.fixture(scope="module")
def of_four(world4, tmp_path_factory):
    """A folder of checkpoints in all forms, of FSDP2."""
    folder = str(tmp_path_factory.mktemp("of_four"))
    world4.run(train_and_save, deal="fsdp2", storages=STORAGES_OF, folder=folder)
    return folder


@pytest.fixture(scope="module")
def of_one(tmp_path_factory):
    """A folder with a checkpoint of one process."""
    folder = str(tmp_path_factory.mktemp("of_one"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "has_kernels", lambda device: False)
        train_and_save("plain", folder, {"as it is": ALL_ENTRIES})
    return folder


def nothing(storages):
    return {storage: [] for storage in storages}


# To four ranks in the first form alone: what a form is loaded from does not depend on their number.
@pytest.mark.parametrize(
    ("world", "form"),
    [("world4", next(iter(FORMS))), *(("world2", form) for form in FORMS)],
    indirect=["world"],
)
def test_four_ranks_to_four_and_two(world, of_four, form):
    storages = STORAGES_OF[form]
    how = {"form": form, "storages": storages, "same_shards": world.size == 4}
    assert world.run(resume, deal="fsdp2", folder=of_four, **how) == world.size * [nothing(storages)]


@pytest.mark.parametrize("form", FORMS)
def test_four_ranks_to_one(of_four, form, eager):
    assert resume("plain", form, of_four, STORAGES_OF[form]) == nothing(STORAGES_OF[form])


@pytest.mark.parametrize(("world", "deal"), [("world2", "tp"), ("world4", "tp-fsdp2")], indirect=["world"])
def test_one_to_two_and_four_ranks(world, deal, of_one):
    found = world.run(resume, deal=deal, form="as it is", folder=of_one, storages=ALL_ENTRIES)
    assert found == world.size * [nothing(ALL_ENTRIES)]


@pytest.mark.parametrize("deal", ["hsdp", "several-meshes", "tp-fsdp2"])
def test_other_meshes(world4, world2, deal, tmp_path, eager):
    """Saved on four ranks of two dimensions; resumed by one process, and on two ranks."""
    how = {"folder": str(tmp_path), "storages": {"as it is": ALL_ENTRIES}}
    world4.run(train_and_save, deal=deal, **how)
    how |= {"form": "as it is", "storages": ALL_ENTRIES}
    assert resume("plain", **how) == nothing(ALL_ENTRIES)
    assert world2.run(resume, deal="fsdp2", **how) == 2 * [nothing(ALL_ENTRIES)]


def save_while_training(folder):
    """The steps to the end are taken before all is written."""
    runs = {storage: build("fsdp2", storage) for storage in ALL_ENTRIES}
    for run in runs.values():
        train("fsdp2", run, 0, SAVED_AT)
    note_parts("fsdp2", runs, folder)
    state_dict = {storage: get(run, "as it is") for storage, run in runs.items()}
    saving = dcp.async_save(state_dict, checkpoint_id=f"{folder}/as it is")
    for run in runs.values():
        train("fsdp2", run, SAVED_AT, END)
    saving.result()
    return resume("fsdp2", "as it is", folder, ALL_ENTRIES)


def test_async_save(world2, tmp_path):
    assert world2.run(save_while_training, folder=str(tmp_path)) == 2 * [nothing(ALL_ENTRIES)]


def test_kernels(kernels2, tmp_path):
    """From two ranks to this process, which has kernels too: plain storage is the same bits there as well."""
    storages = ("amsgrad",)
    kernels2.run(train_and_save, deal="fsdp2", folder=str(tmp_path), storages={"as it is": storages})
    assert resume("plain", "as it is", str(tmp_path), storages) == nothing(storages)


def load_codes_as_floats(form, folder):
    """The error of a checkpoint of 8-bit moments, read for an optimizer of float32 ones."""
    try:
        load({"8-bit": build("fsdp2", "fp32")}, form, f"{folder}/{form}")
    except (CheckpointException, RuntimeError) as error:
        return str(error)


@pytest.mark.parametrize("form", ["as it is", "full", "flattened"])
def test_codes_cannot_be_taken_for_moments(world2, form, tmp_path):
    storages = {form: ("8-bit",)}
    world2.run(train_and_save, deal="fsdp2", folder=str(tmp_path), storages=storages)
    for error in world2.run(load_codes_as_floats, form=form, folder=str(tmp_path)):
        assert re.search(r"Missing key in checkpoint state_dict: 8-bit\.optim\.state\..*weight\.exp_avg", error)


@pytest.fixture
def of_one_8_bit(tmp_path, eager):
    """A checkpoint, and one file with all of it."""
    train_and_save("plain", str(tmp_path), {"as it is": ("8-bit",)})
    dcp_to_torch_save(f"{tmp_path}/as it is", f"{tmp_path}/whole.pt")
    return str(tmp_path)


def load_narrow(folder):
    """Shards without whole groups of codes: the error of loading as usual; the state of the whole checkpoint."""
    run = build("tp", "8-bit", fresh=True)
    try:
        load({"8-bit": run}, "as it is", f"{folder}/as it is")
        error = None
    except CheckpointException as raised:
        error = str(raised)
    state_dict = torch.load(f"{folder}/whole.pt", weights_only=True)["8-bit"]["optim"]
    set_optimizer_state_dict(*run, state_dict)  # without full_state_dict: the optimizer itself deals out what is whole
    weight = run[0].wide_rows.weight
    return error, {name: full(entry) for name, entry in run[1].state[weight].items()}


def test_ranks_without_whole_groups_take_codes_from_one_file(world4, of_one_8_bit):
    whole = torch.load(f"{of_one_8_bit}/whole.pt", weights_only=True)["8-bit"]["optim"]["state"]["wide_rows.weight"]
    for error, state in world4.run(load_narrow, folder=of_one_8_bit):
        assert "Missing key in checkpoint state_dict: 8-bit.optim.state.wide_rows.weight.exp_avg" in error
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[name], moment(name, whole))
