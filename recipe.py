"""YAML -> checked, frozen sections. This file knows the outline; each room owns the type of its own section.

A recipe is read once, at the door, and everything in it is checked there: an unknown key is an error that names the
nearest known one. What is written into a run folder is what ran, overrides included.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from clipress.errors import RecipeError, nearest


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


S = TypeVar("S", bound=Section)


class Recipe(Section):
    """The outline of a recipe. `None` means the section is absent."""

    name: str
    """Names the run folder."""
    seed: int = 0
    """Decides initial weights, order of the data and augmentation."""
    teacher: dict[str, Any] | list[dict[str, Any]] | None = None
    """Where the teacher comes from: models.load.TeacherSpec. Of several, the first is the one students start from."""
    student: dict[str, Any] | None = None
    """models.students.Student, or an open_clip config, to start from; absent: a copy of the teacher."""
    data: dict[str, Any]
    """data.pairs.DataSpec."""
    stages: list[dict[str, dict[str, Any] | None]] = []
    """In order; each a mapping of one stage kind to its settings."""
    runtime: dict[str, Any] = {}
    """compress.train.Runtime: devices, precision, strategy."""
    export: dict[str, Any] = {}
    bench: dict[str, Any] = {}
    serve: dict[str, Any] = {}


def checked(cls: type[S], raw: Mapping[str, Any] | None, where: str) -> S:
    """Turn a mapping into a section of type `cls`, or say which key is wrong and what is allowed."""
    if raw is not None and not isinstance(raw, Mapping):
        raise RecipeError(f"{where}: a mapping of settings is asked for, found {raw!r}.")
    try:
        return cls.model_validate(dict(raw or {}))
    except ValidationError as error:
        raise RecipeError("\n".join(_told(cls, problem, where) for problem in error.errors())) from None


def _told(cls: type[BaseModel], problem: Mapping[str, Any], where: str) -> str:
    path = [str(part) for part in problem["loc"]]
    place = ".".join([where, *path]) if where else ".".join(path)
    if problem["type"] == "extra_forbidden":
        for part in path[:-1]:
            field = cls.model_fields.get(part)
            cls = cls if field is None else _section_in(field.annotation)  # a number counts members of a list
        return f"{place}: unknown key '{path[-1]}'.{nearest(path[-1], cls.model_fields)}"
    if problem["type"] == "missing":
        return f"{place}: this key is needed and is not there."
    return f"{place}: {problem['msg']} (found {problem['input']!r}). Change it in the recipe, or with --set."


def first_problem(error: ValidationError) -> str:
    """Say where a file that was read is wrong, and how: `place: message`."""
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"


def _section_in(annotation: Any) -> type[BaseModel]:
    """Return the section a field holds: itself, in a list, or as one of several choices."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = [_section_in(part) for part in get_args(annotation)]
    return next((section for section in inner if section is not Section), Section)


def read_recipe(path: str | Path, sets: Iterable[str] = ()) -> Recipe:
    """Read and check a recipe's outline. `sets` are overrides such as `stages.1.prune.steps=10`.

    A teacher's own recipe that is named by its file is read into the mapping, so that the result needs no other file.
    """
    path = Path(path)
    raw = _mapping_from(path)
    for override in sets:
        _override(raw, override)
    teachers = raw.get("teacher")
    for teacher in teachers if isinstance(teachers, list) else [teachers]:
        if isinstance(teacher, dict) and isinstance(teacher.get("recipe"), str):
            inner = path.parent / teacher["recipe"]
            teacher["recipe"] = _mapping_from(inner)
    return checked(Recipe, raw, "")


def _mapping_from(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"Recipe {path} was asked for, and there is no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"Recipe {path} cannot be read: {error}.") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"Recipe {path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise RecipeError(f"Recipe {path}: a mapping with named sections is asked for, found {type(raw).__name__}.")
    return raw


def _override(raw: dict[str, Any], text: str) -> None:
    keys, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"--set {text}: KEY=VALUE is asked for, such as --set seed=1.")
    *path, last = keys.split(".")
    place: Any = raw
    try:
        for key in path:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        place[int(last) if isinstance(place, list) else last] = yaml.safe_load(value)
    except (ValueError, IndexError, TypeError, AttributeError):
        raise RecipeError(f"--set {text}: the recipe has no place '{keys}'.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {text}: the value is not valid YAML: {error}") from None


def recipe_text(recipe: Recipe) -> str:
    """Return the recipe as YAML, the way it ran."""
    return yaml.safe_dump(recipe.model_dump(exclude_none=True), sort_keys=False)


def digest(*parts: Any) -> str:
    """Return a short content hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
