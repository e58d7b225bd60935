"""Checks that an integration fits the installed version of its trainer.

A version is not judged by its number. What is replaced must exist with the parameters that the integration knows, and
on a small example replacement and original must have the same values and gradients.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
_warned: set[str] = set()
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Package:
    """A trainer's package.

    Attributes:
        name: its name in the package index.
        tested: the version that the tests run with.
    """

    name: str
    tested: str

    @property
    def remedy(self) -> str:
        """What to do if the installed version does not fit."""
        return f"pip install '{self.name}~={self.tested}', or call the operations of sppo_kernels directly"

    def version(self) -> str:
        """Return the installed version.

        Raises:
            ImportError: the package is not installed.
        """
        try:
            return metadata.version(self.name)
        except metadata.PackageNotFoundError:
            raise ImportError(f"{self.name} is not installed: pip install '{self.name}~={self.tested}'") from None

    def warn_if_untested(self) -> None:
        """Warn, once per process, if the installed version has another minor version than the tested one."""
        found = self.version()
        if found.split(".")[:2] != self.tested.split(".")[:2] and self.name not in _warned:
            _warned.add(self.name)
            warnings.warn(
                f"{self.name} {found} is not tested, only {self.tested} is: what is replaced has the same parameters, "
                "and the same results on a small example",
                stacklevel=3,
            )

    def unfit(self, reason: str) -> ImportError:
        """Return the error of an installed version that the integration does not fit."""
        return ImportError(f"{self.name} {self.version()} does not fit this integration: {reason}; {self.remedy}")

    def check_parameters(self, name: str, function: Any, expected: str, *, may_have_more: bool = False) -> None:
        """Check that a function exists and has the parameters that the integration knows.

        Args:
            name: of the function, with its module.
            function: the function, or None if there is none.
            expected: names of the parameters, separated by spaces.
            may_have_more: whether others with default values may follow, which a wrapper passes on.

        Raises:
            ImportError: it does not.
        """
        if not callable(function):
            raise self.unfit(f"{name} does not exist")
        parameters = list(inspect.signature(function).parameters.values())
        names, known = [p.name for p in parameters], expected.split()
        others = parameters[len(known) :]
        if names[: len(known)] != known or any(not may_have_more or p.default is p.empty for p in others):
            raise self.unfit(f"{name} has the parameters {', '.join(names)}, not {', '.join(known)}")

    def check_results(
        self,
        name: str,
        original: Callable[[], Sequence[Tensor]],
        replacement: Callable[[], Sequence[Tensor]],
        *,
        may_need_gpu: bool = False,
    ) -> None:
        """Check that a replacement gives the tensors of the original on a small example, on the CPU.

        Args:
            name: of the original.
            original, replacement: functions that compute the tensors.
            may_need_gpu: whether an original that raises an error is not compared, as one that needs a GPU.

        Raises:
            ImportError: it does not, or the original raises an error.
        """
        try:
            expected = original()
        except Exception as error:
            if may_need_gpu:
                _log.info("%s is not compared with what replaces it: %s", name, error)
                return
            raise self.unfit(f"{name} raises {type(error).__name__}: {error}") from error
        for i, (x, y) in enumerate(zip(replacement(), expected, strict=True)):
            if x.shape != y.shape or not torch.allclose(x.float(), y.float(), rtol=_TOLERANCE, atol=_TOLERANCE):
                difference = f"by {(x.float() - y.float()).abs().max():.1e}" if x.shape == y.shape else "in shape"
                raise self.unfit(f"result {i} of {name} differs from what replaces it {difference}")


def method(cls: type | None, name: str) -> Any:
    """Return a method of a class, or None if there is no such class or method."""
    return None if cls is None else getattr(cls, name, None)


def example(*, rows: int, columns: int, seed: int = 0, grad: bool = False) -> Tensor:
    """Return normal numbers, the same in each call, float32 on the CPU; global random state does not change."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, device="cpu").requires_grad_(grad)
