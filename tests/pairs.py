"""Our optimizer and another on copies of its parameters: make both, step both, compare."""

import copy

import torch
from helpers import bits

from adamw_triton import AdamW

OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
# fp32 against torch in fp32: both round each of some ten operations of a step.
CLOSE = {"rtol": 3e-6, "atol": 3e-7}
_TORCHS = {"lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"}


def params_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def set_grads(params, grads=None):
    """Set gradients, and return copies of them; random ones unless they are given. None: there is none."""
    grads = [torch.randn_like(p) for p in params] if grads is None else grads
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return [None if grad is None else grad.clone() for grad in grads]


def twins(make):
    """Two of what `make` makes with the same random numbers."""
    made = []
    for _ in range(2):
        torch.manual_seed(5)
        made.append(make())
    return made


def contents(optimizer, *, with_grads=False):
    """Copies of all parameters and their state (and gradients) as they are now, to the bit, by name."""
    found = {}
    for i, param in enumerate(params_of(optimizer)):
        tensors = {"parameter": param, **optimizer.state.get(param, {})}
        if with_grads and param.grad is not None:
            tensors["gradient"] = param.grad
        for name, tensor in tensors.items():
            found[f"{name} {i}"] = tensor.dtype, tensor.device, tensor.shape, bits(tensor)
    return found


def differences(before, after):
    """Names of what differs between two `contents`."""
    changed = (name for name in before.keys() & after.keys() if before[name][:3] != after[name][:3])
    written = (name for name in before.keys() & after.keys() if not torch.equal(before[name][3], after[name][3]))
    return (before.keys() ^ after.keys()) | set(changed) | set(written)


def assert_same(one, other):
    """Two optimizers, or `contents` of some, are the same to the bit."""
    one, other = (given if isinstance(given, dict) else contents(given) for given in (one, other))
    assert not differences(one, other)


def norm_options(optimizer):
    return optimizer.max_grad_norm, optimizer.skip_nonfinite, optimizer.skip_grad_norm_above


def by_hand(reference, norm_options):
    """Step as a training loop does with torch alone. Returns the norm, and whether the step was skipped."""
    max_grad_norm, skip_nonfinite, skip_above = norm_options
    params = [p for group in reference.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    if (skip_nonfinite or skip_above is not None) and not norm.isfinite():
        return norm, True
    if skip_above is not None and norm > skip_above:
        return norm, True
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(params, max_grad_norm)
    reference.step()
    return norm, False


class Pair:
    """Our optimizer and another on copies of its parameters.

    Args:
        params: parameters, or dicts of groups.
        against: options of the other, which is ours too; without them it is torch's.
        options: of ours; those that torch has go to torch's.

    Attributes:
        mine, reference: the two optimizers; ours, theirs: their parameters.
    """

    def __init__(self, params, *, against=None, **options):
        params = list(params)
        copies = copy.deepcopy(params)
        self.mine = AdamW(params, **options)
        if against is None:
            copies = [_torchs(given) if isinstance(given, dict) else given for given in copies]
            self.reference = torch.optim.AdamW(copies, foreach=False, **_torchs(options))
        else:
            self.reference = AdamW(copies, **against)
        self.ours, self.theirs = params_of(self.mine), params_of(self.reference)

    def set_grads(self, grads=None):
        set_grads(self.theirs, set_grads(self.ours, grads))

    def step(self, grads=None):
        """Step both with the same gradients, and compare."""
        self.set_grads(grads)
        self.mine.step()
        self.reference.step()
        self.assert_close()

    def assert_close(self, **tolerances):
        torch.testing.assert_close(self.ours, self.theirs, **{**CLOSE, **tolerances})


def _torchs(options):
    return {name: value for name, value in options.items() if name in _TORCHS or name == "params"}
