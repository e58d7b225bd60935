"""Names in another package's modules, replaced and put back; at once, or when the package imports them itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Name = tuple[ModuleType | type, str]


class Patch:
    """What has been replaced in one package, and what stood there before anything was.

    With ``package`` a name is replaced, and put back, in every loaded module of that package which holds the same
    object under it: ``from a import name`` binds it once more.
    """

    def __init__(self, package: str | None = None) -> None:
        self._package = package
        self._originals: dict[Name, Any] = {}
        self._layers: list[Mapping[Name, Any]] = []

    def apply(self, replacements: Mapping[Name, Any]) -> ExitStack:
        """Put each replacement under its name, over earlier ones. As a context manager, what this returns takes them
        away again on exit, in whatever order that comes.
        """
        found = {(owner, name): getattr(owner, name) for owner, name in replacements}
        self._originals = found | self._originals
        self._layers.append(replacements)
        self._install()
        undo = ExitStack()
        undo.callback(self._remove, replacements)
        return undo

    def restore(self) -> None:
        """Put back what stood there before the first of all that was applied; nothing where nothing was."""
        self._layers.clear()
        self._install()

    def _remove(self, replacements: Mapping[Name, Any]) -> None:
        self._layers = [layer for layer in self._layers if layer is not replacements]
        self._install()

    def _install(self) -> None:
        for (owner, name), original in self._originals.items():
            over = [layer[owner, name] for layer in self._layers if (owner, name) in layer]
            self._put(owner, name, over[-1] if over else original)
        if not self._layers:
            self._originals.clear()

    def _put(self, owner: ModuleType | type, name: str, new: Any) -> None:
        old = getattr(owner, name)
        setattr(owner, name, new)
        for path, module in list(sys.modules.items()):
            if path.split(".")[0] == self._package and getattr(module, "__dict__", {}).get(name) is old:
                setattr(module, name, new)


class AfterImport(MetaPathFinder):
    """Calls ``action`` once, as soon as one of the modules ``names`` has been imported; now, if one has been."""

    def __init__(self, names: Sequence[str], action: Callable[[], object]) -> None:
        self.names = names
        self._action = action
        if sys.modules.keys().isdisjoint(names):
            sys.meta_path.insert(0, self)
        else:
            action()

    def withdraw(self) -> bool:
        """Not to call it any more. Whether it would have."""
        waiting = self in sys.meta_path
        if waiting:
            sys.meta_path.remove(self)
        return waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.names:
            return None
        others = (finder for finder in sys.meta_path[sys.meta_path.index(self) + 1 :] if hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if module.__name__ == fullname and self.withdraw():  # first, for the action may import another of them
                try:
                    self._action()
                except BaseException:
                    sys.meta_path.insert(0, self)
                    raise

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def check_version(package: str, tested: str) -> None:
    """``package`` is installed in the version that was tested, or in another release of the same minor version.

    Raises:
        ImportError: it is not installed, or another version is; other versions keep other things under these names.
    """
    remedy = f"pip install '{package}~={tested}'"
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{package} is not installed: {remedy}") from None
    minor = ".".join(tested.split(".")[:2])
    if ".".join(found.split(".")[:2]) != minor:
        raise ImportError(
            f"{package} must be {minor}.x ({tested} is what this was tested with), got {found}: {remedy}, or call the "
            "operations of sppo_kernels directly"
        )
