import sys
from types import ModuleType

import pytest
import torch

from adamw_triton import launch
from adamw_triton.storage import StateTensors
from adamw_triton.storage.policies import BY_NAME, POLICIES, Policy
from bench import peers

CPU = torch.device("cpu")
SHAPES = [(9, 7), (33,), (3, 128)]
FP32 = BY_NAME["fp32"]
HERE = ["adamw_triton", "adamw_triton foreach=False", "torch for-loop", "torch foreach", "torch fused"]


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.setattr(launch, "has_kernels", lambda device: False)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_problem_has_the_dtypes_of_the_policy(policy):
    params, moments = peers.problem(SHAPES, policy, CPU)
    for shape, param, state in zip(SHAPES, params, moments, strict=True):
        assert param.shape == param.grad.shape == shape
        found = StateTensors.from_entries(state, policy.amsgrad)
        expected = policy.dtypes
        if shape != (3, 128) and not policy.exp_avg.is_floating_point:  # which has no rows of whole groups
            expected = (*expected[:2], torch.float32, torch.float32)
        assert (param.dtype, param.grad.dtype, found.exp_avg.dtype, found.exp_avg_sq.dtype) == expected
        assert ("max_exp_avg_sq" in state) == policy.amsgrad
        assert param.grad.abs().min() >= 0.5 and param.grad.abs().max() <= 1.5
        assert (param.grad > 0).any() and (param.grad < 0).any()


def test_one_tensor_has_the_storage_of_its_policy():
    assert peers.single_shape(1000, FP32) == (1000,)
    assert peers.single_shape(1024, BY_NAME["fp32-8bit"]) == (8, 128)
    with pytest.raises(peers.Unavailable, match="got 1000 elements; fp32-8bit needs a multiple of 128"):
        peers.single_shape(1000, BY_NAME["fp32-8bit"])


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("policy", [FP32, BY_NAME["fp32-amsgrad"]], ids=lambda policy: policy.name)
def test_peers_take_the_same_steps(policy, name):
    stepped = []
    for peer in (peers.BY_NAME["torch for-loop"], peers.BY_NAME[name]):
        torch.manual_seed(2)
        params, moments = peers.problem(SHAPES, policy, CPU)
        before = params[0].detach().clone()
        peers.start(peer, params, policy, moments).step()
        assert not torch.equal(before, params[0])
        stepped.append(params)
    for expected, found in zip(*stepped, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_moments_are_shared():
    params, moments = peers.problem(SHAPES, FP32, CPU)
    kept = [state["exp_avg"] for state in moments]
    for name in HERE:
        optimizer = peers.start(peers.BY_NAME[name], params, FP32, moments)
        assert all(optimizer.state[p]["exp_avg"] is m for p, m in zip(params, kept, strict=True))
    assert kept[0].abs().min() > 0


def test_own_names_and_versions():
    assert len(peers.BY_NAME) == len(peers.PEERS)
    for name in HERE:
        assert peers.BY_NAME[name].version
    assert peers.Peer("x", "no-such-distribution-of-adamw", "", lambda *_: None).version is None


def test_a_missing_package_is_a_reason():
    peer = peers.Peer("x", "no-such-distribution-of-adamw", "", lambda *_: None)
    with pytest.raises(peers.Unavailable, match="no-such-distribution-of-adamw is not installed"):
        peers.start(peer, *problem(FP32))


def test_what_a_peer_raises_is_a_reason_of_one_line():
    def factory(params, policy, moments):
        raise AssertionError("first line\nsecond line")

    with pytest.raises(peers.Unavailable, match=r"^AssertionError: first line$"):
        peers.start(peers.Peer("x", "torch", "", factory), *problem(FP32))


def test_dtypes_that_torch_refuses_are_a_reason():
    with pytest.raises(peers.Unavailable, match="RuntimeError"):
        peers.start(peers.BY_NAME["torch for-loop"], *problem(BY_NAME["bf16-param-grad"]))


def problem(policy: Policy):
    params, moments = peers.problem(SHAPES, policy, CPU)
    return params, policy, moments


@pytest.mark.parametrize(
    ("name", "module", "class_name", "policy", "expected"),
    [
        ("torch-optimi", "optimi", "AdamW", "bf16", {"triton": True, "kahan_sum": False}),
        ("flashoptim", "flashoptim", "FlashAdamW", "bf16", {"quantize": False, "master_weight_bits": None}),
        ("flashoptim 8-bit", "flashoptim", "FlashAdamW", "bf16", {"quantize": True, "master_weight_bits": 24}),
        ("flashoptim 8-bit", "flashoptim", "FlashAdamW", "fp32", {"quantize": True, "master_weight_bits": None}),
        ("torchao 8-bit", "torchao.optim", "AdamW8bit", "fp32-amsgrad", {"amsgrad": True}),
    ],
)
def test_other_packages_get_our_hyper_parameters(monkeypatch, name, module, class_name, policy, expected):
    given = {}

    class Fake:
        def __init__(self, params, **options):
            given.update(options)

        def step(self):
            pass

    fake = ModuleType(module)
    setattr(fake, class_name, Fake)
    monkeypatch.setitem(sys.modules, module.partition(".")[0], ModuleType(module.partition(".")[0]))
    monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setattr(peers.Peer, "version", "1")
    peers.start(peers.BY_NAME[name], *problem(BY_NAME[policy]))
    assert peers.HYPER.items() <= given.items() and expected.items() <= given.items()


@pytest.mark.parametrize("name", ["torch-optimi", "flashoptim", "flashoptim 8-bit", "torchao 8-bit"])
def test_other_packages_say_which_policies_they_do_not_have(monkeypatch, name):
    monkeypatch.setattr(peers.Peer, "version", "1")
    with pytest.raises(peers.Unavailable, match="dtype of its moments"):
        peers.start(peers.BY_NAME[name], *problem(BY_NAME["bf16-param-grad"]))
    if name != "torchao 8-bit":
        with pytest.raises(peers.Unavailable, match="amsgrad"):
            peers.start(peers.BY_NAME[name], *problem(BY_NAME["fp32-amsgrad"]))


def test_long_lists_are_not_compiled():
    params, moments = peers.problem([(1,)] * (peers.MAX_COMPILED_TENSORS + 1), FP32, CPU)
    with pytest.raises(peers.Unavailable, match="minutes to compile"):
        peers.start(peers.BY_NAME["torch compile"], params, FP32, moments)
