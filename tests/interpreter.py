"""Triton's interpreter without what it repeats: more than half of the time of tests that launch kernels.

At every call of a device function the interpreter looks through all of triton.language for what it has to replace; it
has been replaced since the launch began, and once is enough. It makes a table of all dtypes to look up one. And with
each result of an operation it makes the same types and shapes anew.
"""

import functools

import numpy as np
from triton import language
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def speed_up():
    """Keep what does not change: replaced modules during a launch, dtypes in NumPy, types and shapes of blocks."""
    _replace_modules_once()
    dtype_of_scalar = functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda dtype: (
        np.dtype(np.uint64) if isinstance(dtype.scalar, language.pointer_type) else dtype_of_scalar(dtype.scalar)
    )
    _keep_block_types()
    _keep_shapes()
    _pass_equal_operands()


def _replace_modules_once():
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()  # modules, since the launch began

    def patch_new(function):
        modules = {id(value) for value in function.__globals__.values() if value is language or value is language.core}
        if modules and modules <= patched:
            return None
        patched.update(modules)
        return patch(function)

    def launch_anew(self, *args, **kwargs):
        patched.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_new, launch_anew


def _keep_block_types():
    kept, with_element_ty = {}, language.block_type.with_element_ty

    def kept_or_made(self, scalar_ty):
        if type(scalar_ty) is not language.dtype:
            return with_element_ty(self, scalar_ty)
        key = (scalar_ty.name, *self.shape)
        if key not in kept:
            kept[key] = with_element_ty(self, scalar_ty)
        return kept[key]

    def of_block(self, dtype, shape):
        key = (dtype.name, *shape)
        return kept[key] if key in kept else language.block_type(dtype, shape)

    language.block_type.with_element_ty = kept_or_made
    interpreter.InterpreterBuilder.get_block_ty = of_block


def _keep_shapes():
    """Give tensors of one shape one object for it."""
    kept, init = {}, language.tensor.__init__

    def init_with_kept(self, handle, type):
        of_type = getattr(type, "_shape_and_numel", None)
        if of_type is None:
            init(self, handle, type)
            assert vars(self).keys() == {"handle", "type", "dtype", "shape", "numel"}
            key = (*type.shape,) if type.is_block() else ()
            of_type = type._shape_and_numel = kept.setdefault(key, (self.shape, self.numel))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_type

    language.tensor.__init__ = init_with_kept


def _pass_equal_operands():
    """Two blocks of one dtype and shape are what an operation takes; all else Triton brings to that."""
    check, broadcast = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value

    numbers = {}  # as blocks, by value and by dtype and shape of the other operand

    def check_unless_equal(self, lhs, rhs, *args, **kwargs):
        if type(rhs) in (int, float) and type(lhs) is language.tensor and type(lhs.dtype) is language.dtype:
            key = (repr(rhs), lhs.dtype.name, id(lhs.shape), args, *kwargs.items())  # -0.0 is equal to 0.0
            if key not in numbers:
                checked, block = check(self, lhs, rhs, *args, **kwargs)
                numbers[key] = block if checked is lhs else None
            if numbers[key] is not None:
                return lhs, numbers[key]
        if type(lhs) is type(rhs) is language.tensor and lhs.shape is rhs.shape and lhs.dtype is rhs.dtype:
            is_division = len(args) > 3 or kwargs
            if type(lhs.dtype) is language.dtype and not is_division:
                return lhs, rhs
        return check(self, lhs, rhs, *args, **kwargs)

    def broadcast_unless_equal(self, lhs, rhs):
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    # The interpreter computes whether integers overflow, and asserts it only under `debug`.
    assert not interpreter.interpreter_builder.options.debug
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda *args: None
    TritonSemantic.binary_op_type_checking_impl = check_unless_equal
    TritonSemantic.broadcast_impl_value = broadcast_unless_equal
