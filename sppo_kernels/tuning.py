"""Launch configurations: which were measured to be fastest, saved to a file and loaded from it.

A kernel's few candidates and its safe default are data beside it, in its operation's module. Unless told otherwise the
default is launched. ``python -m benchmarks tune`` measures the candidates on a device, a class of shapes at a time, and
saves those that win; then

    sppo_kernels.tuning.load("tuning.json")

launches them in this process. A file holds nothing but names out of those candidates: no configuration that was not
compiled and tested is ever launched. Last bits depend on the block of a forward pass, so old and new log-probabilities
of a run, and all its ranks, want the same file.

There is no tuning at the first call: ``triton.autotune`` would run candidates on the tensors of whoever calls first,
choose anew in every process, and choose differently on each rank. Nor may a kernel that writes over its inputs be
tuned, ever: its second candidate would start from what the first one left.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ._validation import reject

_FORMAT = 1


class Config(NamedTuple):
    """Elements that a program takes at a time, and warps that share them."""

    block: int
    num_warps: int


class Tunable:
    """A kernel's candidates and default, and what was chosen instead, by class of shapes."""

    def __init__(self, name: str, default: Config, *others: Config) -> None:
        self.name, self.default, self.candidates = name, default, (default, *others)
        self.chosen: dict[str, Config] = {}
        self._forced: Config | None = None
        TUNABLES[name] = self

    def config(self, length: int, itemsize: int) -> Config:
        """What to launch for rows of ``length`` elements of ``itemsize`` bytes."""
        return self._forced or self.chosen.get(shape_class(length, itemsize), self.default)

    def choose(self, shapes: str, config: Config) -> None:
        """Launch ``config`` for a class of shapes (see ``shape_class``) from now on. ValueError: no candidate."""
        self._check(config)
        self.chosen = {**self.chosen, shapes: config}

    @contextlib.contextmanager
    def using(self, config: Config) -> Iterator[None]:
        """Launch ``config`` whatever the shape, in all threads, while this lasts. ValueError: no candidate."""
        self._check(config)
        before, self._forced = self._forced, config
        try:
            yield
        finally:
            self._forced = before

    def _check(self, config: Config) -> None:
        if config not in self.candidates:
            reject("config", config, f"one of {self.name}'s candidates {[tuple(c) for c in self.candidates]}")


TUNABLES: dict[str, Tunable] = {}


def shape_class(length: int, itemsize: int) -> str:
    """Rows up to the same power of two, of elements of the same size."""
    return f"{1 << max(0, length - 1).bit_length()} x {itemsize} bytes"


def reset() -> None:
    """Back to the defaults."""
    for tunable in TUNABLES.values():
        tunable.chosen = {}


def save(path: str | os.PathLike[str]) -> None:
    """Write what is chosen, and the name of this device, to a JSON file, whole or not at all. OSError: it cannot be."""
    content = {
        "format": _FORMAT,
        "device": _device_name(),
        "torch": torch.__version__,
        "choices": {name: tunable.chosen for name, tunable in TUNABLES.items() if tunable.chosen},
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)


def load(path: str | os.PathLike[str], *, any_device: bool = False) -> None:
    """Choose what a file written by ``save`` says, in place of what was chosen before.

    Args:
        path: the file.
        any_device: take it also where it was measured on another device.

    Raises:
        OSError: no such file.
        ValueError: not such a file, of another device, or with a kernel or configuration that this version does not
            have; nothing is changed then.
    """
    remedy = "a file that `python -m benchmarks tune` of this version wrote"
    try:
        content = json.loads(Path(path).read_text())
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}")
        choices = {name: _read(name, chosen) for name, chosen in content["choices"].items()}
        device = content["device"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must be {remedy}, got {type(error).__name__}: {error}") from error
    if device != _device_name() and not any_device:
        want = f"of {_device_name()} (measure again with `python -m benchmarks tune`, or pass any_device=True)"
        reject(f"the device of {path}", device, want)
    for name, tunable in TUNABLES.items():
        tunable.chosen = choices.get(name, {})


def _read(name: str, chosen: dict[str, Any]) -> dict[str, Config]:
    if name not in TUNABLES:
        reject("kernel", repr(name), f"one of {', '.join(TUNABLES)}")
    configs = {str(shapes): Config(*config) for shapes, config in chosen.items()}
    for config in configs.values():
        TUNABLES[name]._check(config)
    return configs


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
