"""Named methods, each registered where it is written: losses, criteria, stages, formats, importers, runners, tasks.

    LOSSES = Registry("loss", "clipress.compress.losses")

    @LOSSES.register("crd")
    class Crd(Loss): ...

A registry imports its packages the first time it is read, and with them whatever other distributions add: a package that
declares an entry point in the group `clipress.plugins` is imported too, and registers its methods in the same way.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from clipress.errors import RecipeError, nearest

PLUGINS = "clipress.plugins"
T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from names to methods, filled by the decorator `register`.

    Args:
        kind: what an entry is called in messages, such as "loss".
        packages: modules and packages whose import registers the entries; of a package every module in it.
    """

    def __init__(self, kind: str, *packages: str) -> None:
        self.kind, self._packages = kind, packages
        self._entries: dict[str, T] = {}
        self._is_loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that adds what it decorates under `name`. Raises ValueError for a name that is taken."""

        def add(entry: T) -> T:
            known = self._entries.get(name)
            if known is not None and _origin(known) != _origin(entry):
                raise ValueError(f"{self.kind} '{name}' is registered twice: by {_origin(known)} and {_origin(entry)}")
            self._entries[name] = entry
            return entry

        return add

    @contextmanager
    def registered(self, name: str, entry: T) -> Iterator[T]:
        """Register an entry for the duration of a `with` block, for experiments and tests."""
        self.register(name)(entry)
        try:
            yield entry
        finally:
            del self._entries[name]

    def find(self, name: str, where: str) -> T:
        """Return an entry. Raises RecipeError, with the nearest known name, when there is none; `where` begins it."""
        if name not in self:
            raise RecipeError(f"{where}: unknown {self.kind} '{name}'.{nearest(name, self)}")
        return self[name]

    def check(self, name: str) -> str:
        """Return a name that is registered; ValueError, with the nearest known name, for any other.

        A validator for settings: `criterion: Annotated[str, AfterValidator(CRITERIA.check)]`.
        """
        if name not in self:
            raise ValueError(f"unknown {self.kind} '{name}'.{nearest(name, self)}")
        return name

    def __getitem__(self, name: str) -> T:
        self._load()
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(self._entries)

    def __len__(self) -> int:
        self._load()
        return len(self._entries)

    def _load(self) -> None:
        if self._is_loaded:
            return
        self._is_loaded = True  # before the imports: an imported module may look something up
        try:
            for name in self._packages:
                package = importlib.import_module(name)
                for module in pkgutil.iter_modules(getattr(package, "__path__", [])):
                    if not module.ispkg:
                        importlib.import_module(f"{name}.{module.name}")
            load_plugins()
        except BaseException:
            self._is_loaded = False
            raise


@cache
def load_plugins() -> None:
    """Import every installed distribution's entry points of the group `clipress.plugins`, once."""
    for point in entry_points(group=PLUGINS):
        point.load()


def _origin(entry: Any) -> str:
    return f"{getattr(entry, '__module__', type(entry).__module__)}.{getattr(entry, '__qualname__', entry)}"
