"""torch.set_default_dtype, torch.set_default_device and `with torch.device(...)` change nothing here."""

import contextlib
import copy
import functools
import sys
from pathlib import Path

import pytest
import torch
from helpers import bits
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import adamw_triton
from adamw_triton import AdamW, adamw_, register_gradient_release

SHAPES = [(3, 5), (1030,), (2, 90), (7,)]
EIGHT_BITS = {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8}
OF_ALL = {"max_grad_norm": 0.5, "skip_nonfinite": True, "statistics": True}
CASES = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {"foreach": True}),
    "fp16, each": (torch.float16, {"foreach": False}),
    "fp64, cautious": (torch.float64, {"cautious": True}),
    "cautious": (torch.float32, {"cautious": True, "foreach": False}),
    "complex": (torch.complex64, {}),
    "amsgrad": (torch.float32, {"amsgrad": True}),
    "capturable": (torch.float32, {"capturable": True}),
    "decouple_lr": (torch.float32, {"decouple_lr": True}),
    "tensor lr": (torch.float32, {"lr": torch.tensor(1e-2)}),
    "max_grad_norm": (torch.float32, {"max_grad_norm": 0.5}),
    "skip_nonfinite": (torch.bfloat16, {"skip_nonfinite": True}),
    "statistics": (torch.float32, {"statistics": True}),
    "statistics, each": (torch.bfloat16, {"statistics": True, "foreach": False}),
    "8 bits": (torch.float32, EIGHT_BITS),
    "8 bits, each": (torch.bfloat16, {**EIGHT_BITS, "foreach": False}),
    "masters 32": (torch.bfloat16, {"master_weight_bits": 32}),
    "masters 24": (torch.bfloat16, {"master_weight_bits": 24, "foreach": False}),
    "masters fp16": (torch.float16, {"master_weight_bits": 32}),
    "stochastic": (torch.bfloat16, {"stochastic_rounding": True, "seed": 3}),
    "all": (torch.bfloat16, {**EIGHT_BITS, "master_weight_bits": 24, "stochastic_rounding": True, **OF_ALL}),
}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


AMBIENT = {
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device meta": lambda: default_device("meta"),
    "within a meta device": lambda: torch.device("meta"),
}


def record(value):
    """Everything that two equal results have in common."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device, tuple(value.shape), value.stride(), bits(value).numpy().tobytes()
    if isinstance(value, dict):
        return {key: record(entry) for key, entry in value.items()}
    return list(map(record, value)) if isinstance(value, (list, tuple)) else value


class Run:
    """Training whose data does not depend on the defaults."""

    def __init__(self, case, device):
        self.dtype, options = CASES[case]
        options = copy.deepcopy(options)  # a learning rate may be a tensor, which the run changes
        self.device = device
        self.generator = torch.Generator("cpu").manual_seed(1)
        self.params = [nn.Parameter(self.random(shape)) for shape in SHAPES]
        groups = [{"params": self.params[:2]}, {"params": self.params[2:], "lr": 3e-2}]
        self.optimizer = AdamW(groups, **{"lr": 1e-2, **options})
        self.options = options
        self.results = []

    def random(self, shape):
        dtype = torch.complex64 if self.dtype.is_complex else torch.float32
        return torch.randn(shape, generator=self.generator, dtype=dtype, device="cpu").to(self.device, self.dtype)

    def step(self, optimizer=None, params=None, missing=None, poisoned=False):
        optimizer, params = optimizer or self.optimizer, params or self.params
        for i, p in enumerate(params):
            p.grad = None if i == missing else self.random(p.shape)
        if poisoned:
            params[-1].grad[3] = torch.nan
        optimizer.step()
        names = ("grad_norm", "skipped_steps", "update_norm", "param_norm")
        self.results.append(record([list(params), [dict(optimizer.state[p]) for p in params]]))
        self.results.append(record([getattr(optimizer, name) for name in names]))

    def plan(self):
        self.step()
        self.step()

    def go_on(self):
        optimizer = self.optimizer
        self.step(missing=1)
        self.step(missing=0)
        for group in optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].mul_(0.5)
            else:
                group["lr"] *= 0.5
        self.step(poisoned=bool(self.options.get("skip_nonfinite")))
        optimizer.add_param_group({"params": [nn.Parameter(self.random((130,)))]})
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.step()

    def finish(self):
        optimizer = self.optimizer
        masters = optimizer.master_params()
        saved = optimizer.state_dict()
        self.results.append(record([optimizer.state_bytes().by_name, masters, saved["state"]]))
        self.results.append(record(optimizer.torch_state_dict()["state"]))
        self.results.append(str(optimizer.state_bytes()))
        optimizer.load_master_params([value * 2 for value in masters])
        self.step()
        for stored in (saved, optimizer.torch_state_dict()):
            params = [nn.Parameter(p.detach().clone()) for p in self.params]
            other = AdamW(
                [{"params": params[:2]}, {"params": params[2:4]}, {"params": params[4:]}],
                **{"lr": 1e-2, **self.options},
            )
            other.load_state_dict(stored)
            self.step(other, params)
        return self.results


def run(case, device, *, built=contextlib.nullcontext, planned=contextlib.nullcontext, rest=contextlib.nullcontext):
    """The results of one training, with a context around each of its phases."""
    with built():
        training = Run(case, device)
    with planned():
        training.plan()
    with rest():
        training.go_on()
        return training.finish()


@pytest.mark.parametrize("case", CASES)
def test_optimizer(case, device, path):
    expected = run(case, device)
    names = ["default dtype float64", "default device meta"] if path == "kernel" else AMBIENT  # interpreted: slow
    for name in names:
        ambient = AMBIENT[name]
        assert run(case, device, built=ambient, planned=ambient, rest=ambient) == expected, name


@pytest.mark.parametrize("case", ["fp32", "8 bits", "all"])
def test_defaults_that_change_in_between(case, device, path):
    """What was made under one default is used under another."""
    expected = run(case, device)
    float64, bfloat16, meta, within_meta = AMBIENT.values()
    assert run(case, device, built=float64, planned=meta, rest=bfloat16) == expected
    assert run(case, device, built=meta, rest=float64) == expected
    assert run(case, device, planned=bfloat16, rest=within_meta) == expected


@contextlib.contextmanager
def in_hooks(context, within_hook=None):
    """Within hooks that are registered here, which autograd calls without the modes that are active.

    A default device is a mode too: there it has to be entered as one, since setting it again would leave it behind.
    """
    within_hook = within_hook or context
    register = torch.Tensor.register_post_accumulate_grad_hook

    def register_within(param, hook):
        def within(param):
            with within_hook():
                hook(param)

        return register(param, within)

    with pytest.MonkeyPatch.context() as monkeypatch, context():
        monkeypatch.setattr(torch.Tensor, "register_post_accumulate_grad_hook", register_within)
        yield


def run_release(device, options):
    generator = torch.Generator("cpu").manual_seed(2)
    layers = [nn.Linear(30, 40, device=device, dtype=torch.float32) for _ in range(2)]
    model = nn.Sequential(layers[0], nn.Linear(40, 30, device=device, dtype=torch.float32), layers[1])
    for p in model.parameters():
        nn.init.normal_(p, generator=generator)
    optimizer = AdamW(model.parameters(), **options)
    handle = register_gradient_release(model, optimizer)
    results = []
    for _ in range(3):
        inputs = torch.randn(5, 30, generator=generator, dtype=torch.float32, device="cpu").to(device)
        model(inputs).sum().backward()
        results.append(record([[p, dict(optimizer.state[p])] for p in model.parameters()]))
        results.append(record([optimizer.skipped_steps, optimizer.update_norm, optimizer.param_norm]))
    handle.remove()
    return results


RELEASE = [{}, {"skip_nonfinite": True}, {"statistics": True}, EIGHT_BITS, {"capturable": True}]


@pytest.mark.parametrize("options", RELEASE, ids=str)
def test_gradient_release(options, device, path):
    expected = run_release(device, options)
    for name, ambient in AMBIENT.items():
        within_hook = AMBIENT["within a meta device"] if name == "default device meta" else None
        with in_hooks(ambient, within_hook):
            assert run_release(device, options) == expected, name


def run_function(device):
    generator = torch.Generator("cpu").manual_seed(2)

    def random(dtype):
        return torch.randn(1100, generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)

    results = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for options in ({}, {"cautious": True}, {"grad_scale": 4.0, "found_inf": 0.0}, {"found_inf": 1.0}):
            scaling = {k: v for k, v in options.items() if k != "cautious"}
            tensors = {k: torch.tensor([v], dtype=torch.float32, device=device) for k, v in scaling.items()}
            values = [random(dtype) for _ in range(3)]
            values.append(random(dtype).square())
            adamw_(*values, step=3, lr=1e-2, **{**options, **tensors})
            results.append(record(values))
    values = [random(torch.bfloat16) for _ in range(3)]
    values.append(random(torch.bfloat16).square())
    adamw_(*values, step=3, lr=1e-2, stochastic_rounding=True, seed=3, stream=2, element_offset=8)
    return [*results, record(values)]


def test_function(device, path):
    expected = run_function(device)
    for name, ambient in AMBIENT.items():
        with ambient():
            assert run_function(device) == expected, name


# A guard against the next one

PACKAGE = [Path(folder).resolve() for folder in adamw_triton.__path__]
PACKAGE += [Path(folder).resolve() for folder in sys.modules["adamw_triton.kernels"].__path__]
LIKE_THEIR_ARGUMENT = {"tensor", "as_tensor", "asarray"}  # where that is a tensor


@functools.cache
def is_of_package(filename):
    return any(folder in Path(filename).resolve().parents for folder in PACKAGE)


class FactoryGuard(TorchFunctionMode):
    """Notes every call by the package that makes a tensor by a default.

    `*_like` and `new_*` take dtype and device from a tensor; `frombuffer` demands a dtype and is always on the CPU.
    """

    factories = _device_constructors()

    def __init__(self):
        super().__init__()
        self.seen, self.wrong = 0, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        frame = sys._getframe(1)
        name = getattr(func, "__name__", "")
        if is_of_package(frame.f_code.co_filename):
            self.check(func, name, args, kwargs, f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return func(*args, **kwargs)

    def check(self, func, name, args, kwargs, where):
        if func in self.factories and not (name in LIKE_THEIR_ARGUMENT and isinstance(args[0], torch.Tensor)):
            self.seen += 1
            missing = [option for option in ("dtype", "device") if kwargs.get(option) is None]
            if missing:
                self.wrong.append(f"{where}: torch.{name} without {' and '.join(missing)}")
        elif func is torch.where and len(args) == 3 and not any(isinstance(x, torch.Tensor) for x in args[1:]):
            self.wrong.append(f"{where}: torch.where of two Python numbers has the default dtype")


def guarded(function, *args):
    guard = FactoryGuard()
    with in_hooks(lambda: guard):
        function(*args)
    assert not guard.wrong, "\n".join(sorted(set(guard.wrong)))
    return guard.seen


@pytest.mark.parametrize("case", CASES)
def test_every_factory_names_dtype_and_device(case, device, path):
    assert guarded(run, case, device) > 0


@pytest.mark.parametrize("options", RELEASE, ids=str)
def test_every_factory_of_gradient_release(options, device, path):
    assert guarded(run_release, device, options) > 0


def test_every_factory_of_the_function(device, path):
    assert guarded(run_function, device) > 0


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        ("torch.zeros(3)", "torch.zeros without dtype and device"),
        ("torch.full((2,), 1.0, device='cpu')", "torch.full without dtype"),
        ("torch.tensor([1.0], dtype=torch.float32)", "torch.tensor without device"),
        ("torch.as_tensor(1.0)", "torch.as_tensor without dtype and device"),
        ("torch.arange(3, dtype=None, device='cpu')", "torch.arange without dtype"),
        ("[torch.rand(2) for _ in range(2)]", "torch.rand without dtype and device"),
        ("torch.where(tensor > 0, 0.5, 1.0)", "torch.where of two Python numbers"),
        ("torch.zeros(3, dtype=torch.int64, device='cpu')", None),
        ("torch.as_tensor(tensor, dtype=torch.float64)", None),
        ("torch.empty_like(tensor).fill_(1.0)", None),
        ("tensor.new_tensor([1.0])", None),
        ("torch.where(tensor > 0, tensor, 1.0)", None),
    ],
)
def test_the_guard_sees_what_it_is_for(call, complaint):
    tensor = torch.ones(3)
    scope = {"torch": torch, "tensor": tensor}
    for folder in (PACKAGE[0], PACKAGE[-1]):
        code = compile(f"\n{call}", str(folder / "made_up.py"), "exec")
        if complaint is None:
            guarded(exec, code, scope)
        else:
            with pytest.raises(AssertionError, match=r"made_up\.py:2: ") as failure:
                guarded(exec, code, scope)
            assert complaint in str(failure.value)
    guarded(exec, compile(call, str(Path(__file__)), "exec"), scope)  # it is of the package only
