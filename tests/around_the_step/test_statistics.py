"""AdamW(statistics=True): the norms of the update and of the parameters, against float64.

What is summed is the parameter in fp32 before it is rounded to its storage. Where the master weights are exact, these
are the numbers that `master_params` gives, and only the sums can be off:

    change       new - old, rounded to fp32           2 units of 2^-24 in its square
    square       in fp32                              1
    sum          of the elements that share a number  10: a block of 1024, in a tree; all further sums are in fp64

which is 13 units of the sum of squares, and half as many of the norm: SUMS. Everywhere the update itself is compared
with its definition, see `assert_statistics`.
"""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from helpers import QUANTUM, UNIT, Guarded, allow_any_grad_dtype, bits, exact, oracle, scalars_row, storage_units
from pairs import Pair, assert_same, set_grads
from torch import nn

from adamw_triton import AdamW, launch, storage
from adamw_triton.hyperparams import Hyperparams
from adamw_triton.storage import StateTensors
from adamw_triton.storage.policies import POLICIES

OPTIONS = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
SIZES = (1, 7, 129, 2501, (5, 384))
SUMS = 7 * 2.0**-24
U = 2.0**-24


def norm(arrays):
    return np.sqrt(sum((np.square(a).sum() for a in arrays), np.longdouble(0)))


def numbers(tensor):
    """Of real ones, as many as there are; in extended precision."""
    return exact(torch.view_as_real(tensor) if tensor.is_complex() else tensor)


def masters(optimizer):
    return list(map(numbers, optimizer.master_params()))


def moments(entries, amsgrad):
    """As the step reads them; zeros are what there is before the first."""
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 2 + amsgrad]
    return [storage.moment(name, entries).clone() for name in names]


def storage_slack(policy, weights):
    """How far rounding moves the stored weights; 0 where there is nothing left to round."""
    if policy.param == torch.float32 or policy.master_weight_bits == 32:
        return 0.0
    if policy.master_weight_bits == 24:
        return norm([2.0**-16 * abs(w) for w in weights])
    units = 2 if policy.stochastic_rounding else storage_units(policy.param)
    return norm([units * (UNIT[policy.param] * abs(w) + QUANTUM[policy.param]) for w in weights])


def with_gradients(params, policy, device):
    for p in params:
        if policy.grad != policy.param:
            allow_any_grad_dtype(p)
        p.grad = torch.randn(p.shape, device=device).to(policy.grad)


def assert_statistics(optimizer, before, before_moments, grads, step, policy):
    """Both norms, by two oracles: the master weights around the step, and the definition of the step.

    The second for what is rounded before `master_params` shows it. Its error: by the triangle inequality the norm of
    the elements' errors. These are, as for `helpers.assert_step`, in units: 2 of the parameter, 8 of the update (18
    from 8-bit moments, whose root and quotient are approximate) and 3 of exp_avg.
    """
    update_norm, param_norm = optimizer.update_norm, optimizer.param_norm
    for value in (update_norm, param_norm):
        assert value.dtype == torch.float64 and value.shape == () and value.device == optimizer.skipped_steps.device
    update_norm, param_norm = update_norm.item(), param_norm.item()
    after = masters(optimizer)
    slack = storage_slack(policy, after)
    for actual, expected in (
        (update_norm, norm([new - old for new, old in zip(after, before, strict=True)])),
        (param_norm, norm(after)),
    ):
        assert abs(actual - expected) <= SUMS * expected + slack, (actual, expected, slack)

    changes, weights, errors = [], [], []
    of_update = 8 if policy.exp_avg_sq.is_floating_point else 18
    for old, state, grad in zip(before, before_moments, grads, strict=True):
        old_tensor = torch.from_numpy(old.astype(np.float64))
        new, (exp_avg, *_), slope = oracle(old_tensor, grad, state, step=step, **OPTIONS)
        changes.append(new - old)
        weights.append(new)
        of_exp_avg = 3 * U * np.maximum(abs(exact(state[0])), abs(exact(grad)))
        errors.append(2 * U * abs(old) + of_update * U * slope * abs(exp_avg) + slope * of_exp_avg)
    for actual, expected in ((update_norm, norm(changes)), (param_norm, norm(weights))):
        assert abs(actual - expected) <= SUMS * expected + norm(errors), (actual, expected, norm(errors))
    assert norm(errors) < 1e-3 * norm(changes), "or the bound would say nothing"


def assert_both(optimizer, before):
    """Both norms, where all master weights are exact."""
    after = masters(optimizer)
    update = norm([new - old for new, old in zip(after, before, strict=True)])
    assert abs(optimizer.update_norm.item() - update) <= SUMS * update
    assert abs(optimizer.param_norm.item() - norm(after)) <= SUMS * norm(after)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_norms_and_an_update_of_the_same_bits(policy, foreach, device, path):
    """Of three steps, next to an optimizer without statistics."""
    params = [nn.Parameter(torch.randn(n, device=device).mul(0.5).to(policy.param)) for n in SIZES]
    twins = copy.deepcopy(params)
    options = {**OPTIONS, **policy.options, "foreach": foreach}
    optimizer, plain = AdamW(params, statistics=True, **options), AdamW(twins, **options)
    assert optimizer.update_norm is None and optimizer.param_norm is None
    for step in (1, 2, 3):
        with_gradients(params, policy, device)
        for p, q in zip(params, twins, strict=True):
            if policy.grad != policy.param:
                allow_any_grad_dtype(q)
            q.grad = p.grad.clone()
        before = masters(optimizer)
        if step == 1:
            known = [[torch.zeros(p.shape)] * (2 + policy.amsgrad) for p in params]
        else:
            known = [moments(optimizer.state[p], policy.amsgrad) for p in params]
        optimizer.step()
        plain.step()
        assert_statistics(optimizer, before, known, [p.grad for p in params], step, policy)
        assert plain.update_norm is None and plain.param_norm is None
        assert_same(optimizer, plain)


DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


@pytest.mark.parametrize("foreach", [True, False, None])
def test_of_several_launches(foreach, device, path):
    """Dtypes, groups, step counts, alignment and layouts; together one norm."""
    shapes = [(), (3,), (33, 40), (0,)]
    params = [nn.Parameter(torch.randn(s, dtype=d, device=device)) for d, s in itertools.product(DTYPES, shapes)]
    params.append(nn.Parameter(torch.randn(1501, device=device)[1:]))
    params.append(nn.Parameter(torch.randn(30, 41, device=device).t()))
    params.append(nn.Parameter(torch.randn(20, 50, device=device)[:, ::2]))
    params.append(nn.Parameter(torch.randn(3, 4, 5, 6, device=device).to(memory_format=torch.channels_last)))
    groups = [{"params": params[i::3], "lr": 0.1 / (i + 1), "maximize": i == 1, "amsgrad": i == 2} for i in range(3)]
    optimizer = AdamW(groups, foreach=foreach, statistics=True, betas=(0.8, 0.95))
    for p in params[::2]:  # the others start a step later
        p.grad = torch.randn_like(p)
    optimizer.step()
    for _ in range(3):
        set_grads(params)
        before = masters(optimizer)
        optimizer.step()
        assert_both(optimizer, before)


@pytest.mark.parametrize("options", [{"cautious": True}, {"maximize": True}, {"lr": 0.0}, {"eps": 0.0}], ids=str)
def test_options_of_the_update(options, device, path):
    """With eps = 0, what is beyond the end of a tensor is 0 / 0."""
    params = [nn.Parameter(torch.randn(n, device=device)) for n in SIZES]
    optimizer = AdamW(params, **{**OPTIONS, **options}, statistics=True)
    for _ in range(2):
        set_grads(params)
        before = masters(optimizer)
        optimizer.step()
        assert_both(optimizer, before)
    if "lr" in options:
        assert optimizer.update_norm.item() == 0


@pytest.mark.fast
def test_with_clipping_and_a_scaler(device, path):
    params = [nn.Parameter(torch.randn(n, device=device)) for n in SIZES]
    optimizer = AdamW(params, **OPTIONS, statistics=True, max_grad_norm=1e-6)
    optimizer.grad_scale = torch.full((1,), 512.0, device=device)
    for _ in range(2):
        set_grads(params)
        before = masters(optimizer)
        optimizer.step()
        assert_both(optimizer, before)


def test_without_any_element(device, path):
    params = [nn.Parameter(torch.zeros(0, device=device)), nn.Parameter(torch.zeros(0, 3, device=device))]
    optimizer = AdamW(params, statistics=True)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.update_norm.item() == optimizer.param_norm.item() == 0


def test_not_finite(device, path):
    """They say so, where nothing skips the step."""
    params = [nn.Parameter(torch.randn(n, device=device)) for n in SIZES]
    optimizer = AdamW(params, **OPTIONS, statistics=True)
    set_grads(params)
    params[3].grad[2000] = float("nan")
    optimizer.step()
    assert optimizer.update_norm.isnan() and optimizer.param_norm.isnan()


def test_switched_on_and_off_between_steps(device, path):
    pair = Pair([nn.Parameter(torch.randn(n, device=device)) for n in SIZES], against=OPTIONS, **OPTIONS)
    optimizer = pair.mine
    for wanted in (False, True, True, False, False, True):
        optimizer.statistics = wanted
        before = masters(optimizer)
        pair.step()
        if wanted:
            assert_both(optimizer, before)
        else:
            assert optimizer.update_norm is None and optimizer.param_norm is None
        assert_same(optimizer, pair.reference)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("by", ["norm", "scaler"])
def test_a_skipped_step_leaves_them(by, foreach, device, path):
    params = [nn.Parameter(torch.randn(n, device=device)) for n in SIZES]
    optimizer = AdamW(params, **OPTIONS, statistics=True, foreach=foreach, skip_nonfinite=by == "norm")
    found_inf = torch.zeros(1, device=device)
    if by == "scaler":
        optimizer.found_inf = found_inf
    for _ in range(2):
        set_grads(params)
        before = masters(optimizer)
        optimizer.step()
        assert_both(optimizer, before)
        known = optimizer.update_norm.clone(), optimizer.param_norm.clone()
        assert known[0] > 0
        found_inf.fill_(1.0)
        params[1].grad[3] = float("inf")
        optimizer.step()
        assert torch.equal(known[0], optimizer.update_norm) and torch.equal(known[1], optimizer.param_norm)
        found_inf.zero_()
    assert optimizer.skipped_steps.item() == 2


@pytest.mark.parametrize("foreach", [True, False])
def test_after_a_change_they_begin_anew(foreach, device, path):
    """A parameter has its first gradient: NaN until a step with it is not skipped."""
    params = [nn.Parameter(torch.randn(n, device=device)) for n in SIZES]
    optimizer = AdamW(params, **OPTIONS, statistics=True, skip_nonfinite=True, foreach=foreach)
    set_grads(params, [None, *(torch.randn_like(p) for p in params[1:])])
    optimizer.step()
    known = optimizer.update_norm.item()
    assert known > 0
    params[0].grad = torch.full_like(params[0], float("inf"))
    for skipped in (1, 2):
        optimizer.step()
        assert optimizer.skipped_steps.item() == skipped
        # Where there are no plans, there is none to change.
        assert math.isnan(optimizer.update_norm.item()) or (path == "reference" and optimizer.update_norm == known)
    set_grads(params)
    before = masters(optimizer)
    optimizer.step()
    assert_both(optimizer, before)


@pytest.mark.parametrize("foreach", [True, False])
def test_of_parameters_with_gradients_only(foreach, device, path):
    """A gradient that is missing takes its parameter out of both norms, for as long as it is."""
    params = [nn.Parameter(torch.randn(n, device=device)) for n in SIZES]
    optimizer = AdamW(params, **OPTIONS, statistics=True, foreach=foreach, skip_nonfinite=True)
    for missing in ((), (1, 3), (0,), ()):
        set_grads(params, [None if i in missing else torch.randn_like(p) for i, p in enumerate(params)])
        before = masters(optimizer)
        optimizer.step()
        after = masters(optimizer)
        present = [i for i in range(len(params)) if i not in missing]
        update, weight = norm([after[i] - before[i] for i in present]), norm([after[i] for i in present])
        for _ in range(2):
            assert abs(optimizer.update_norm.item() - update) <= SUMS * update
            assert abs(optimizer.param_norm.item() - weight) <= SUMS * weight
            next(p for p in params if p.grad is not None).grad.fill_(torch.nan)
            optimizer.step()  # is skipped


def test_values_read_are_not_overwritten(device, path):
    """By the next step: whoever logs them now and then keeps what was read."""
    params = [nn.Parameter(torch.randn(n, device=device)) for n in SIZES]
    optimizer = AdamW(params, **OPTIONS, statistics=True)
    set_grads(params)
    optimizer.step()
    read = optimizer.update_norm, optimizer.param_norm
    values = [t.item() for t in read]
    optimizer.step()
    assert [t.item() for t in read] == values != [optimizer.update_norm.item(), optimizer.param_norm.item()]


# The kernel itself

HYPERPARAMS = Hyperparams(lr=3e-2, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1)


def squares_of_blocks(values, block_size):
    return np.array([np.square(values[i : i + block_size]).sum() for i in range(0, len(values), block_size)])


@pytest.mark.parametrize("form", ["tensor", "table"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_each_program_writes_its_sums_and_nothing_else(dtype, offset, form, device):
    """Blocks full and not, in memory that is guarded on both sides."""
    guarded = Guarded()
    used = launch.configuration_of(dtype, torch.float32)
    sizes = (1, used.block_size - 1, used.block_size, 2 * used.block_size + 3)
    params, grads, states = [], [], []
    for n in sizes:
        place = [guarded.place(torch.randn(n, device=device).to(dtype), offset=offset) for _ in range(2)]
        moment = torch.float64 if dtype == torch.float64 else torch.float32
        params.append(place[0])
        grads.append(place[1])
        states.append(
            StateTensors(
                guarded.place(torch.randn(n, device=device).to(moment), offset=offset),
                guarded.place(torch.rand(n, device=device).to(moment), offset=offset),
            )
        )
    before = [exact(p) for p in params]
    expected = [
        oracle(p, g, s[:2], step=2, lr=3e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)[0]
        for p, g, s in zip(params, grads, states, strict=True)
    ]
    before_grads = [bits(g).clone() for g in grads]
    programs = [launch.n_programs(n, used) for n in sizes]
    statistics = guarded.place(torch.full((sum(programs), 16, 4), float("nan"), device=device))
    scalars = scalars_row(HYPERPARAMS, 2, device, torch.float64 if dtype == torch.float64 else torch.float32)
    if form == "table":
        table = launch.Table.of(params, dtype, states, aligned=False)
        addresses = torch.tensor([g.data_ptr() for g in grads], device=device)
        launch.launch_table(table, addresses, scalars.repeat(len(sizes), 1), maximize=False, statistics=statistics)
    else:
        for p, g, s, share in zip(params, grads, states, statistics.split(programs), strict=True):
            launch.launch_tensor(p, g, s, scalars, maximize=False, statistics=share)
    guarded.assert_untouched()
    assert all(map(torch.equal, before_grads, map(bits, grads)))
    assert torch.equal(statistics[..., :2], statistics[..., 2:]), "each number twice"
    sums = exact(statistics)[..., :2].sum(axis=1)
    changes = np.concatenate(
        [squares_of_blocks(new - old, used.block_size) for new, old in zip(expected, before, strict=True)]
    )
    weights = np.concatenate([squares_of_blocks(new, used.block_size) for new in expected])
    # Of the norms: two units of the parameters in that of their changes, ten units of each; of the sums, twice that.
    relative = U * (10 + 2 * np.sqrt(weights / changes))
    assert (abs(sums[:, 0] - changes) <= 2 * relative * changes).all()
    assert (abs(sums[:, 1] - weights) <= 2 * 10 * U * weights).all()


@pytest.mark.parametrize("form", ["tensor", "table"])
def test_a_skipping_kernel_writes_no_sums(form, device):
    values = [torch.randn(1500, device=device).abs() for _ in range(4)]
    state = StateTensors(*values[2:])
    statistics = torch.full((2, 16, 4), -5.0, device=device)
    options, scalars = {"maximize": False, "statistics": statistics}, scalars_row(HYPERPARAMS, 2, device)
    options["decision"] = torch.tensor([1.0, 1.0], dtype=torch.float64, device=device)
    before = [bits(v).clone() for v in values]
    for skips in (True, False):
        options["decision"][1] = skips
        if form == "table":
            table = launch.Table.of(values[:1], torch.float32, [state], aligned=False)
            addresses = torch.tensor([values[1].data_ptr()], device=device)
            launch.launch_table(table, addresses, scalars[None], **options)
        else:
            launch.launch_tensor(*values[:2], state, scalars, **options)
        assert bool((statistics == -5.0).all()) is skips
        assert all(map(torch.equal, before, map(bits, values))) is skips


def test_with_empty_parameters_and_steps_without_gradients(device, path):
    """What was the last stays."""
    empty = nn.Parameter(torch.zeros(0, device=device, dtype=torch.bfloat16))
    params = [empty, *(nn.Parameter(torch.randn(n, device=device)) for n in (5, 1300))]
    optimizer = AdamW(params, statistics=True, skip_nonfinite=True)
    assert optimizer.update_norm is None
    set_grads(params)
    optimizer.step()
    known = optimizer.update_norm, optimizer.param_norm
    assert known[0] > 0
    optimizer.zero_grad()
    optimizer.step()
    assert (optimizer.update_norm, optimizer.param_norm) == known
    set_grads(params, [torch.full_like(p, math.nan) if p is not params[2] else None for p in params])
    optimizer.step()
    assert optimizer.skipped_steps == 1 and (optimizer.update_norm, optimizer.param_norm) == known
