"""Rounding of bfloat16 in Triton's interpreter (3.6 to 3.9), which truncates float32 where a GPU rounds to nearest.

With truncation the logit gradient of a row would not sum to zero, an error that does not occur on a GPU.
"""

import numpy as np
import torch


def round_to_nearest() -> None:
    """Patch the interpreter to round float32 to the nearest bfloat16."""
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
