"""A model with and without gradient release."""

import torch
from helpers import Guarded
from pairs import OPTIONS, assert_same, twins
from torch import nn

from adamw_triton import AdamW, register_gradient_release

# Two blocks of a kernel and two groups of an 8-bit moment, a tail of one, few, one element without dimensions.
SHAPES = [(33, 41), (129,), (7, 1), ()]
OFFSETS = [0, 1, 0, 3]  # elements off a 16-byte boundary


class Weights(nn.Module):
    """Parameters whose gradients are what forward is given: they lie between borders that nobody may write to."""

    def __init__(self, device, dtype=torch.float32, shapes=SHAPES, grad_dtype=None):
        super().__init__()
        self.guard = Guarded()
        values = [torch.randn(shape).to(device, dtype) for shape in shapes]
        offsets = (OFFSETS * len(shapes))[: len(shapes)]
        self.weights = nn.ParameterList(
            nn.Parameter(self.guard.place(v, o)) for v, o in zip(values, offsets, strict=True)
        )
        for weight in self.weights:
            if grad_dtype not in (None, dtype):
                weight.grad_dtype = grad_dtype

    def forward(self, grads):
        terms = [(w * g).sum() for w, g in zip(self.weights, grads, strict=True) if g is not None]
        return torch.stack(terms).sum()

    def random_grads(self):
        return [torch.randn(w.shape).to(w.device, w.dtype) for w in self.weights]


class Released:
    """The same model and optimizer twice: the second has gradient release, unless it is not `register`ed.

    Attributes:
        plain, released: the models; optimizers: theirs.
        handle: of the release.
    """

    def __init__(self, make_model, groups=lambda model: model.parameters(), *, register=True, **options):
        self.models = self.plain, self.released = twins(make_model)
        self.optimizers = [AdamW(groups(model), **{**OPTIONS, **options}) for model in self.models]
        self.handle = register_gradient_release(self.released, self.optimizers[1]) if register else None

    @classmethod
    def of_weights(cls, device, dtype=torch.float32, groups=None, shapes=SHAPES, grad_dtype=None, **options):
        """`groups` are dicts whose "params" are indices."""

        def of_model(model):
            if groups is None:
                return model.weights
            return [{**group, "params": [model.weights[i] for i in group["params"]]} for group in groups]

        return cls(lambda: Weights(device, dtype, shapes, grad_dtype), of_model, **options)

    @property
    def optimizer(self):
        """That of the release."""
        return self.optimizers[1]

    def step_plain(self, *inputs):
        self.plain(*inputs).backward()
        self.optimizers[0].step()
        self.optimizers[0].zero_grad()

    def step(self, *inputs):
        """Both; random gradients of `Weights` unless inputs are given."""
        inputs = inputs or (self.plain.random_grads(),)
        self.step_plain(*inputs)
        self.released(*inputs).backward()
        assert all(p.grad is None for p in self.released.parameters())
        self.assert_same()

    def assert_same(self):
        """Parameters, state and the memory around them, to the bit."""
        assert_same(*self.optimizers)
        for model in self.models:
            if isinstance(model, Weights):
                model.guard.assert_untouched()

    def counts(self):
        state = self.optimizer.state
        return [float(state[p]["step"]) if state.get(p) else None for p in self.released.parameters()]
