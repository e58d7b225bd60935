"""Launch configurations of the kernels: candidates, defaults, and measured choices saved to a file.

The candidates and the default of a kernel are defined in the module of its operation. The default is launched unless
another candidate is chosen. ``python -m benchmarks tune`` measures the candidates on a device, one class of shapes
after another, and saves the fastest. Then

    sppo_kernels.tuning.load("tuning.json")

launches them in this process. A file can only choose among the candidates, so every configuration that is launched has
been compiled and tested. The last bits of a result depend on the block size of the forward pass: use the same file on
every rank and for both old and new log-probabilities.

Kernels are not tuned on their first call. ``triton.autotune`` would run the candidates on the caller's tensors, choose
again in every process, and choose differently on each rank. A kernel that overwrites its inputs must never be tuned at
all, because its second candidate would start from the output of the first.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch

from ._validation import reject

_FORMAT = 1


class Config(NamedTuple):
    """Number of elements per block and number of warps per program."""

    block: int
    num_warps: int


C = TypeVar("C", bound=tuple[int, ...])
"""A named tuple of numbers: what a kernel is launched with."""


class Tunable(Generic[C]):
    """Candidates and default of a kernel, and the configuration chosen for each class of shapes."""

    def __init__(self, name: str, default: C, *others: C) -> None:
        self.name, self.default, self.candidates = name, default, (default, *others)
        self.chosen: dict[str, C] = {}
        self._forced: C | None = None
        TUNABLES[name] = self

    def choice(self, shapes: str) -> C | None:
        """Return the configuration chosen for a class of shapes, or None."""
        return self._forced or self.chosen.get(shapes)

    def config(self, length: int, itemsize: int) -> C:
        """Return the configuration for rows of ``length`` elements of ``itemsize`` bytes."""
        return self.choice(shape_class(length, itemsize)) or self.default

    def read(self, values: Iterable[int]) -> C:
        """Return the candidate with these values.

        Raises:
            ValueError: there is none.
        """
        config = cast(C, tuple(values))
        self._check(config)
        return self.candidates[self.candidates.index(config)]

    def choose(self, shapes: str, config: C) -> None:
        """Launch ``config`` for a class of shapes (see ``shape_class``) from now on.

        Raises:
            ValueError: ``config`` is not a candidate.
        """
        self._check(config)
        self.chosen = {**self.chosen, shapes: config}

    @contextlib.contextmanager
    def using(self, config: C) -> Iterator[None]:
        """Launch ``config`` for every shape and in all threads, inside the context.

        Raises:
            ValueError: ``config`` is not a candidate.
        """
        self._check(config)
        previous, self._forced = self._forced, config
        try:
            yield
        finally:
            self._forced = previous

    def _check(self, config: C) -> None:
        if config not in self.candidates:
            reject("config", config, f"one of {self.name}'s candidates {[tuple(c) for c in self.candidates]}")


TUNABLES: dict[str, Tunable[Any]] = {}


def shape_class(length: int, itemsize: int) -> str:
    """Name the class of rows whose length rounds up to the same power of two, with elements of the same size."""
    return f"{1 << max(0, length - 1).bit_length()} x {itemsize} bytes"


def reset() -> None:
    """Launch the defaults again."""
    for tunable in TUNABLES.values():
        tunable.chosen = {}


def save(path: str | os.PathLike[str]) -> None:
    """Write the choices and the name of this device to a JSON file, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    content = {
        "format": _FORMAT,
        "device": _device_name(),
        "torch": torch.__version__,
        "choices": {name: tunable.chosen for name, tunable in TUNABLES.items() if tunable.chosen},
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def load(path: str | os.PathLike[str], *, any_device: bool = False) -> None:
    """Replace all choices by those of a file written by ``save``.

    Args:
        path: the file.
        any_device: accept a file that was measured on another device.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is invalid, was measured on another device, or names a kernel or configuration that this
            version does not have. The choices are unchanged then.
    """
    remedy = "a file written by `python -m benchmarks tune` of this version"
    try:
        content = json.loads(Path(path).read_text())
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}")
        choices = {name: _read(name, chosen) for name, chosen in content["choices"].items()}
        device = content["device"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must be {remedy}, got {type(error).__name__}: {error}") from error
    if device != _device_name() and not any_device:
        expected = f"{_device_name()} (measure again with `python -m benchmarks tune`, or pass any_device=True)"
        reject(f"the device of {path}", device, expected)
    for name, tunable in TUNABLES.items():
        tunable.chosen = choices.get(name, {})


def _read(name: str, chosen: dict[str, Any]) -> dict[str, Any]:
    if name not in TUNABLES:
        reject("kernel", repr(name), f"one of {', '.join(TUNABLES)}")
    return {str(shapes): TUNABLES[name].read(config) for shapes, config in chosen.items()}


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
