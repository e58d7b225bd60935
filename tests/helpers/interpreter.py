"""Patches of Triton's interpreter (3.6 to 3.9): bfloat16 is rounded to nearest, and kernels run faster."""

from types import SimpleNamespace

import numpy as np
import torch


def patch() -> None:
    """Apply all patches."""
    round_to_nearest()
    patch_language_once_per_launch()
    remember_types()


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


def remember_types() -> None:
    """Patch the interpreter to describe each type of block once, and to compare shapes before it broadcasts.

    It describes types, and goes through the dimensions of both operands, in every operation.
    """
    try:
        import triton.language as tl
        from triton.language.semantic import TritonSemantic
        from triton.runtime import interpreter
    except ImportError:
        return
    core, broadcast = tl.core, TritonSemantic.broadcast_impl_value
    describe_block, describe_tensor, numpy_type = (
        core.block_type.__init__,
        core.tensor.__init__,
        interpreter._get_np_dtype,
    )
    blocks, shapes, numpy_types = {}, {}, {}

    def block_type(self, element_ty, shape):
        sizes = tuple([x.value if isinstance(x, core.constexpr) else x for x in shape])
        key = element_ty.name, sizes
        if key not in blocks:
            describe_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    def tensor(self, handle, type):
        key = type.name if type.is_block() else ""
        if key not in shapes:
            describe_tensor(self, handle, type)
            shapes[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    def get_np_dtype(tt_dtype):
        key = tt_dtype.name
        if key not in numpy_types:
            numpy_types[key] = numpy_type(tt_dtype)
        return numpy_types[key]

    def broadcast_impl_value(self, lhs, rhs):
        are_blocks = lhs.type.is_block() and rhs.type.is_block()
        return (
            (lhs, rhs) if are_blocks and lhs.type.shape.values == rhs.type.shape.values else broadcast(self, lhs, rhs)
        )

    TritonSemantic.broadcast_impl_value = broadcast_impl_value
    core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype = block_type, tensor, get_np_dtype
