"""Triton's interpreter without what it repeats: more than a third of the time of tests that launch kernels.

At every call of a device function the interpreter looks through all of triton.language for what it has to replace; it
has been replaced since the launch began, and once is enough. And it makes a table of all dtypes to look up one.
"""

import functools

import numpy as np
from triton import language
from triton.runtime import interpreter


def speed_up():
    """Let a launch replace each module of the language once, and keep what dtypes are in NumPy."""
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
    dtype_of_scalar = functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda dtype: (
        np.dtype(np.uint64) if isinstance(dtype.scalar, language.pointer_type) else dtype_of_scalar(dtype.scalar)
    )
