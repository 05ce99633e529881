"""kernels/scalars.py: every step counts on the device, and makes the numbers of the update there."""

import math

import pytest
import torch
from helpers import Guarded

from adamw_triton import launch
from adamw_triton.grad_control import NO_NORM, GradDecision, GradScalerInputs
from adamw_triton.hyperparams import Hyperparams, KernelScalars, kernel_scalars
from adamw_triton.step_counts import StepCounts, packed_hyperparams

HYPERPARAMS = [
    Hyperparams(1e-3, 0.9, 0.999, 1e-8, 1e-2),
    Hyperparams(0.0, 0.0, 0.0, 0.0, 0.0),
    Hyperparams(0.5, 0.5, 0.999999, 1e-3, 0.0),
    Hyperparams(1e-2, 0.3, 0.95, 1e-8, 0.1, 2e-2),
]
STEPS = [1.0, 2.0, 17.0, 1000.0, 123457.0]


def test_scalars_have_the_order_of_the_kernels():
    assert KernelScalars._fields == (
        "decay", "lerp_weight", "beta2", "one_minus_beta2", "neg_step_size", "inv_bias_correction2_sqrt", "eps", "step",
    )  # fmt: skip


def exact_scalars(hyperparams, step):
    """The host's numbers, where 1 - beta^step has not lost the digits that beta close to 1 takes away."""
    _, beta1, beta2, *_ = hyperparams.numbers()
    correction1, correction2 = (-math.expm1(step * math.log(beta)) if beta else 1.0 for beta in (beta1, beta2))
    return kernel_scalars(hyperparams, step)._replace(
        neg_step_size=-float(hyperparams.lr) / correction1, inv_bias_correction2_sqrt=correction2**-0.5
    )


@pytest.mark.parametrize("step", STEPS)
def test_the_hosts_numbers(step):
    for of_group in HYPERPARAMS:
        assert kernel_scalars(of_group, step) == pytest.approx(exact_scalars(of_group, step), rel=1e-9)


class Counters:
    """Counts of so many parameters in guarded memory, in turns of each group, and what a step needs of them."""

    def __init__(self, n_params, device, hyperparams=HYPERPARAMS, *, need_double=True):
        self.guard, self.device, self.hyperparams, self.copies = Guarded(), device, hyperparams, []
        self.before = [STEPS[i % len(STEPS)] - 1 for i in range(n_params)]
        self.groups = [i % len(hyperparams) for i in range(n_params)]
        self.steps = [self.guard.place(torch.full((1,), n, device=device), border=8) for n in self.before]
        self.counts = StepCounts(self.steps, self.groups, need_double=need_double)

    def advance(self, missing=(), decision=None, scaler=None, *, decided=False):
        grads = [0 if i in missing else 16 for i in range(len(self.steps))]
        rows = [packed_hyperparams(of, self.device, self.copies, capturing=False) for of in self.hyperparams]
        words = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.int64).to(self.device)
        grads = torch.tensor(grads, device=self.device)
        scaler = scaler or GradScalerInputs()
        self.counts.advance(grads, words, decision, scaler, decided=decided, sums=None, options=NO_NORM)
        self.guard.assert_untouched()

    def counted(self):
        return [step.item() for step in self.steps]

    def expected(self, groups=HYPERPARAMS):
        rows = [exact_scalars(groups[group], n + 1) for group, n in zip(self.groups, self.before, strict=True)]
        return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.fast
@pytest.mark.parametrize("n_params", [1, 127, 128, 300])
def test_against_exact_numbers(n_params, device):
    """Of one program and of several, without what lies beyond the last parameter."""
    counters = Counters(n_params, device)
    counters.advance()
    expected = counters.expected()
    torch.testing.assert_close(counters.counts.scalars64.cpu(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(counters.counts.scalars.cpu(), expected.float(), rtol=2**-23, atol=0)
    assert counters.counted() == [n + 1 for n in counters.before]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, "cpu"], ids=str)
def test_hyper_parameters_in_memory(dtype, device):
    """Where the kernel can read them, in a copy of a dtype that it cannot, and on the host."""
    where = {"dtype": torch.float64, "device": "cpu"} if dtype == "cpu" else {"dtype": dtype, "device": device}
    in_memory = [
        Hyperparams(*(torch.tensor(x, **where) for x in of[:3]), of.eps, torch.tensor(of.weight_decay, **where), of[5])
        for of in HYPERPARAMS
    ]
    # In bfloat16 0.999999 is 1, which leaves nothing to correct.
    in_memory, groups = (given[:2] if dtype == torch.bfloat16 else given for given in (in_memory, HYPERPARAMS))
    rounded = [Hyperparams(*of.numbers()) for of in in_memory]
    groups = [of._replace(beta2=0.9921875) if dtype == torch.bfloat16 and of.beta2 else of for of in rounded]
    if dtype == torch.bfloat16:
        in_memory[0].beta2.fill_(0.9921875)
    counters = Counters(9, device, in_memory)
    counters.advance()
    torch.testing.assert_close(counters.counts.scalars64.cpu(), counters.expected(groups), rtol=1e-12, atol=0)
    assert bool(counters.copies) is (dtype == torch.bfloat16)


def test_a_missing_gradient_counts_nothing(device):
    counters = Counters(150, device)
    missing = {0, 5, 127, 128, 149}
    counters.advance(missing)
    counters.advance(missing)
    assert counters.counted() == [n + 2 * (i not in missing) for i, n in enumerate(counters.before)]


@pytest.mark.parametrize("need_double", [False, True])
def test_no_double_scalars_unless_needed(need_double, device):
    counters = Counters(3, device, need_double=need_double)
    counters.advance()
    assert (counters.counts.scalars64 is not None) is need_double
    torch.testing.assert_close(counters.counts.scalars.cpu(), counters.expected().float(), rtol=2**-23, atol=0)


@pytest.mark.parametrize("decided", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_counts_unless_skipped(decided, skip, device):
    """Its verdict comes from a decision made before, or is made here, once, by the first of several programs."""
    counters, decision = Counters(300, device), GradDecision(device)
    decision.values[1] = float(skip and decided)
    scaler = GradScalerInputs(
        torch.tensor([8.0], device=device), torch.tensor([float(skip and not decided)], device=device)
    )
    counters.advance(decision=decision, scaler=scaler, decided=decided)
    assert counters.counted() == [n + (not skip) for n in counters.before]
    assert counters.counts.scalars[:, 7].tolist() == [n + 1 for n in counters.before]
    if decided:
        assert decision.values[:2].tolist() == [1, float(skip)] and decision.skipped == 0
    else:
        assert decision.values[:2].tolist() == [1 / 8, float(skip)] and decision.skipped == int(skip)


def test_scalars_block_is_what_these_tests_take_it_for():
    assert launch.SCALARS_BLOCK == 128
