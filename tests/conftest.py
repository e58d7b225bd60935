"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before Triton is imported.

``pytest --hypothesis-profile fast`` tries three examples of each property.
"""

import os

import interpreter
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

interpreter.round_to_nearest()
interpreter.patch_language_once_per_launch()

settings.register_profile("fast", max_examples=3)
