"""A rank that refuses a step raises; no other waits for it, and with a norm none takes the step."""

import pytest
import torch
import torch.distributed as dist
from handmade import changed, local_contents, make, names, refusal, set_grads, steps, values

FAULTS = {
    "learning rate": "Invalid learning rate: -1.0",
    "sparse": "does not support sparse gradients",
    "plain": "its gradient a plain tensor",
    "options": "differentiable=True is not supported",
}


def spoil(fault, params, optimizer):
    """Make this rank refuse the next step. Returns how to undo that."""
    group = optimizer.param_groups[0]
    if fault in ("learning rate", "options"):
        name, wrong = ("lr", -1.0) if fault == "learning rate" else ("differentiable", True)
        right, group[name] = group[name], wrong
        return lambda: group.update({name: right})
    # Tensor parallel leaves the norm plain.
    param = params[names().index("norm.weight" if fault == "sparse" else "columns.weight")]
    right, param.grad = param.grad, None
    param.grad = torch.ones(param.shape).to_sparse() if fault == "sparse" else torch.ones(param.shape)

    def undo():
        param.grad = None
        param.grad = right

    return undo


def written(before, after):
    """Names of what has changed. State may have been made, of nothing but zeros."""
    made = {name: torch.zeros_like(value) for name, value in after.items() if name not in before}
    return changed({**before, **made}, after)


def step_with_a_fault(deal, fault, at_step, options):
    """Two steps, of which rank 1 refuses one at first.

    Returns:
        The error, and names of what that step has written; the last norm, and names of what differs from steps without
        a fault.
    """
    params, optimizer = make(deal, **options)
    at_fault = []
    for step in range(2):
        set_grads(deal, params, values(1 + step, torch.float32))
        if step == at_step:
            before = local_contents(params, optimizer)
            undo = spoil(fault, params, optimizer) if dist.get_rank() == 1 else lambda: None
            error = refusal(optimizer.step)
            at_fault = [error, written(before, local_contents(params, optimizer))]
            undo()
        optimizer.step()
    norm = optimizer.grad_norm.item()
    others, without_fault = make(deal, **options)
    steps(deal, others, without_fault, 0, 2)
    different = changed(local_contents(params, optimizer), local_contents(others, without_fault))
    return *at_fault, norm, different


CASES = [("world2", "tp", fault, at_step) for fault in FAULTS for at_step in (0, 1)]
CASES += [("kernels2", "tp", "learning rate", 0), ("kernels2", "tp", "plain", 1)]
CASES += [("world4", deal, "plain", 1) for deal in ("fsdp2", "several-meshes", "tp-fsdp2")]


@pytest.mark.parametrize(("world", "deal", "fault", "at_step"), CASES, indirect=["world"])
def test_no_rank_steps(world, deal, fault, at_step):
    options = {"max_grad_norm": 0.7, "statistics": at_step == 1}
    results = world.run(step_with_a_fault, deal=deal, fault=fault, at_step=at_step, options=options)
    for rank, (error, written, norm, different) in enumerate(results):
        assert FAULTS[fault] in error if rank == 1 else error is None
        assert written == [], "a refused step has written something"
        assert norm == results[0][2] and different == [], "the steps after it are others"
