"""Triton backend of the row passes."""

from ..results import RowPass
from .backward import backward, cache
from .forward import GroupMaxima, forward

__all__ = ["TRITON_ROW_PASS", "GroupMaxima"]

TRITON_ROW_PASS = RowPass(forward, backward, cache)
