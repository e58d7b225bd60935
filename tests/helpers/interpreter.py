"""Two patches of Triton's interpreter (3.6 to 3.9): bfloat16 is rounded to nearest, and launches take half the time."""

from types import SimpleNamespace

import numpy as np
import torch


def patch() -> None:
    """Apply both patches."""
    round_to_nearest()
    patch_language_once_per_launch()


def round_to_nearest() -> None:
    """Patch the interpreter to round float32 to the nearest bfloat16, as a GPU does, where it truncates.

    With truncation the logit gradient of a row would not sum to zero, an error that does not occur on a GPU.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    convert = interpreter._convert_float

    def convert_float(data, source, target, rounding_mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, rounding_mode)
        rounded = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)).bfloat16()
        return rounded.view(torch.uint16).numpy().reshape(data.shape)

    interpreter._convert_float = convert_float


def patch_language_once_per_launch() -> None:
    """Patch the interpreter to replace the functions of ``triton.language`` only when a kernel is launched.

    A launch replaces them in the modules that the kernel's own module imports, and each call of a device function
    replaces all of them again. Here a launch replaces them in both modules that a device function may import.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    replace = interpreter._patch_lang
    both_modules = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # of a function only its globals are read

    def call(self, *args, **kwargs):
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter._patch_lang = lambda fn: replace(both_modules)
    interpreter.InterpretedFunction.__call__ = call
