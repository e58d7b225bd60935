"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before Triton is imported."""

import os

import interpreter
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

interpreter.round_to_nearest()
interpreter.patch_language_once_per_launch()
