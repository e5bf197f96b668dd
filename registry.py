"""Registries of named methods: losses, criteria, stages, data formats, importers, runners, tasks.

    LOSSES = Registry("loss", "clipress.compress.losses")

    @LOSSES.register("crd")
    class Crd(Loss): ...

A registry imports its packages on first access, together with all plugins: distributions that declare an entry point in the
group `clipress.plugins`, and register their methods in the same way.
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
        kind: name of an entry in messages, such as "loss".
        packages: modules that register the entries when imported; for a package, all modules in it.
    """

    def __init__(self, kind: str, *packages: str) -> None:
        self.kind, self._packages = kind, packages
        self._entries: dict[str, T] = {}
        self._is_loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers a method under `name`. Raises ValueError if the name is taken."""

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
        """Return an entry. Raises RecipeError, prefixed by `where` and with the nearest name, if there is none."""
        if name not in self:
            raise RecipeError(f"{where}: unknown {self.kind} '{name}'.{nearest(name, self)}")
        return self[name]

    def check(self, name: str) -> str:
        """Return `name` if it is registered. Raises ValueError, with the nearest name, if it is not.

        For use in settings: `criterion: Annotated[str, AfterValidator(CRITERIA.check)]`.
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
        self._is_loaded = True  # set before the imports, since an imported module may look something up
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
    """Import the entry points in the group `clipress.plugins` of all installed distributions, once."""
    for point in entry_points(group=PLUGINS):
        point.load()


def _origin(entry: Any) -> str:
    return f"{getattr(entry, '__module__', type(entry).__module__)}.{getattr(entry, '__qualname__', entry)}"
