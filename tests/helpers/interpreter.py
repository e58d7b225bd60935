"""Triton's interpreter (3.6 to 3.9) cuts a float32 off where it stores bfloat16; a GPU rounds to the nearest.

Cut, the gradient of the logits would no longer add up to zero over a row, an error that no GPU makes.
"""

import numpy as np
import torch


def round_to_nearest() -> None:
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
