"""Modules that stand in for those of a package that is not there."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator

OURS = ("lib_dinotile.webui", "lib_dinotile.hosts")
"""What may import the WebUI's modules."""


class _AnyAttribute(type):
    """The type of classes that have whatever they are asked for."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyAttribute(name, (), {})


class _AnyClass(types.ModuleType):
    """A module with whatever class it is asked for."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> type:
        return getattr(_AnyAttribute("any", (), {}), name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(name, self) if name.split(".")[0] == self._package else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _AnyClass(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextlib.contextmanager
def stand_in(package: str) -> Iterator[None]:
    """Within, the package and whatever is in it can be imported: modules with any class that they are asked for."""
    finder = _Finder(package)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]


@contextlib.contextmanager
def anew() -> Iterator[None]:
    """Within, what is for the WebUIs is imported anew; what was imported before is back afterwards."""

    def ours() -> list[str]:
        return [name for name in sys.modules if name.startswith(OURS)]

    def forget(names: list[str]) -> None:
        for name in names:
            del sys.modules[name]
            package, _, last = name.rpartition(".")
            if package in sys.modules:
                vars(sys.modules[package]).pop(last, None)

    before = {name: sys.modules[name] for name in ours()}
    forget(list(before))
    try:
        yield
    finally:
        forget(ours())
        sys.modules.update(before)
        for name, module in before.items():
            package, _, last = name.rpartition(".")
            setattr(sys.modules[package], last, module)


@contextlib.contextmanager
def webui() -> Iterator[None]:
    """Within, what is for the WebUIs can be imported, anew and without one; what they have is a stand-in's."""
    with anew(), stand_in("modules"):
        yield
