"""YAML -> validated, frozen sections. This file defines the outline; each room owns the type of its own section.

A recipe is validated completely when it is read: an unknown key is an error that names the nearest known one. The recipe
written into a run folder is the one that ran, overrides included.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from clipress.errors import ArtifactError, RecipeError, nearest
from clipress.recipe_v1 import upgrade, upgraded_path
from clipress.storage import read_json

RECIPE = "recipe.yaml"  # in a run folder: the recipe that ran
MAX_BYTES, MAX_VALUES, MAX_DEPTH = 1_000_000, 100_000, 64  # Limits of a recipe with its aliases expanded.
MAX_PROBLEMS, MAX_SHOWN = 20, 200  # problems in one message, characters of a value in it


class Section(BaseModel):
    """Base class of all sections: frozen, no unknown keys, finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


def _plain_name(name: str) -> str:
    if not name or name[0] == "." or len(name) > 100 or not name.isprintable() or "/" in name or "\\" in name:
        raise ValueError("expected a folder name: no slashes, no leading dot, at most 100 characters")
    return name


FolderName = Annotated[str, AfterValidator(_plain_name)]
"""A name that cannot point outside its parent folder."""


S, M = TypeVar("S", bound=Section), TypeVar("M", bound=BaseModel)


class Recipe(Section):
    """The outline of a recipe. `None` means the section is absent."""

    name: FolderName
    """Name of the run folder."""
    task: str = "clip"
    """The model's task: a name in tasks.TASKS."""
    seed: int = Field(0, ge=0, lt=1 << 32)
    """Seed of initial weights, data order and augmentation."""
    teacher: dict[str, Any] | list[dict[str, Any]] | None = None
    """models.load.TeacherSpec: where the teacher comes from. Students start from the first of several teachers."""
    student: dict[str, Any] | None = None
    """models.students.Student, or an open_clip config; absent: a copy of the teacher."""
    data: dict[str, Any]
    """data.spec.DataSpec."""
    stages: list[dict[str, dict[str, Any] | None]] = []
    """Stages in order; each maps one stage kind to its settings."""
    runtime: dict[str, Any] = {}
    """compress.train.Runtime: devices, precision, strategy."""
    export: dict[str, Any] = {}
    bench: dict[str, Any] = {}
    serve: dict[str, Any] = {}


def checked(cls: type[S], raw: Mapping[str, Any] | None, where: str) -> S:
    """Turn a mapping into a section of type `cls`. Raises RecipeError that names the wrong keys and what is allowed."""
    if raw is not None and not isinstance(raw, Mapping):
        raise RecipeError(f"{where}: expected a mapping of settings, found {raw!r:.{MAX_SHOWN}}.")
    try:
        return cls.model_validate(dict(raw or {}))
    except ValidationError as error:
        problems = [_described(cls, problem, where) for problem in error.errors()[:MAX_PROBLEMS]]
        more = [f"... and {error.error_count() - MAX_PROBLEMS} more."] if error.error_count() > MAX_PROBLEMS else []
        raise RecipeError("\n".join([*problems, *more])) from None


def _described(cls: type[BaseModel], problem: Mapping[str, Any], where: str) -> str:
    path = [f"{part!s:.{MAX_SHOWN}}" for part in problem["loc"]]
    place = ".".join([where, *path]) if where else ".".join(path)
    if problem["type"] == "extra_forbidden":
        for part in path[:-1]:
            field = cls.model_fields.get(part)
            cls = cls if field is None else _section_in(field.annotation)  # an integer is an index into a list
        return f"{place}: unknown key '{path[-1]}'.{nearest(path[-1], cls.model_fields)}"
    if problem["type"] == "missing":
        return f"{place}: this key is required."
    return (
        f"{place}: {problem['msg']} (found {problem['input']!r:.{MAX_SHOWN}}). Change it in the recipe, or with --set."
    )


def overridden(section: S, settings: Mapping[str, Any], where: str) -> S:
    """Return a section with some settings replaced and everything validated again. Raises RecipeError."""
    return checked(type(section), {**section.model_dump(), **settings}, where) if settings else section


def first_problem(error: ValidationError) -> str:
    """Return the first problem of a file as `place: message`."""
    problem = error.errors()[0]
    place, message = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def read_typed(cls: type[M], path: Path, again: str, **more: Any) -> M:
    """Read a JSON file that clipress wrote, as its type; `more` are fields that are not in the file.

    Raises FileNotFoundError, and for a damaged file ArtifactError, which ends with `again`, what to do.
    """
    try:
        found = read_json(path)
        return cls.model_validate(found | more if isinstance(found, dict) else found)
    except FileNotFoundError:
        raise
    except ValidationError as error:
        raise ArtifactError(f"{path}, {first_problem(error)}. {again}") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}. {again}") from None


def _section_in(annotation: Any) -> type[BaseModel]:
    """Return the section type of a field, which may be in a list or one of several alternatives."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = [_section_in(part) for part in get_args(annotation)]
    return next((section for section in inner if section is not Section), Section)


def read_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read and validate a recipe's outline. `overrides` are values by key, such as {"stages.1.prune.steps": 10}.

    A teacher's recipe that is given as a file name is read and inserted, so that the result needs no other file.
    """
    path = Path(path)
    raw = upgrade(mapping_from(path))  # Overrides then replace values whichever name the recipe has for them.
    for key, value in (overrides or {}).items():
        _override(raw, key, value)
    raw = upgrade(raw)  # An override's value may be a section of version 1.
    teachers = raw.get("teacher")
    for teacher in teachers if isinstance(teachers, list) else [teachers]:
        if isinstance(teacher, dict) and isinstance(teacher.get("recipe"), str):
            inner = path.parent / teacher["recipe"]
            teacher["recipe"] = upgrade(mapping_from(inner))
    return checked(Recipe, raw, "")


def mapping_from(path: Path, what: str = "Recipe") -> dict[str, Any]:
    """Read a YAML file of named sections; `what` starts messages. Raises RecipeError for anything else."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise RecipeError(f"{what} {path}: expected at most {MAX_BYTES:,} bytes. This is not a recipe.")
        raw = _value_from(text.decode("utf-8-sig"))
    except FileNotFoundError:
        raise RecipeError(f"{what} {path}: no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{what} {path} cannot be read: {error}.") from None
    except ValueError as error:
        raise RecipeError(f"{what} {path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise RecipeError(f"{what} {path}: expected a mapping with named sections, found {type(raw).__name__}.")
    return raw


def _value_from(text: str) -> Any:
    """Read YAML as plain data. Raises ValueError for invalid YAML, and for aliases that make it too large or endless."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        values, depth = _extent(node, {})
        if values > MAX_VALUES or depth > MAX_DEPTH:
            raise ValueError(
                f"it has more than {MAX_VALUES:,} values, or nests deeper than {MAX_DEPTH}, with its aliases expanded"
            )
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"it nests deeper than {MAX_DEPTH}") from None
    except (
        yaml.YAMLError,
        LookupError,
        AttributeError,
        TypeError,
        ArithmeticError,
    ) as error:  # !!bool x, !!timestamp x
        raise ValueError(str(error)) from None


def _extent(node: yaml.Node, known: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """Return the number of values in an expanded node, where long texts count as several, and its depth."""
    if isinstance(node, yaml.ScalarNode):
        return 1 + len(node.value.encode("utf-8")) // 100, 1
    if id(node) not in known:
        known[id(node)] = (math.inf, math.inf)  # until it is computed: a node that contains itself is endless
        pairs = isinstance(node, yaml.MappingNode)
        inner = [part for pair in node.value for part in pair] if pairs else node.value
        sizes, depths = zip((0, 0), *(_extent(part, known) for part in inner), strict=True)
        known[id(node)] = (1 + sum(sizes), 1 + max(depths))
    return known[id(node)]


def overrides_from(texts: Iterable[str]) -> dict[str, Any]:
    """Parse overrides written as `KEY=VALUE`, the value in YAML. Raises RecipeError."""
    overrides = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise RecipeError(f"Override {text:.{MAX_SHOWN}}: expected KEY=VALUE, such as seed=1.")
        try:
            overrides[key] = _value_from(value)
        except ValueError as error:
            raise RecipeError(f"Override {text:.{MAX_SHOWN}}: the value is not valid YAML: {error}") from None
    return overrides


def _override(raw: dict[str, Any], key: str, value: Any) -> None:
    *path, last = upgraded_path(key.split("."))
    place: Any = raw
    try:
        for part in path:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        place[int(last) if isinstance(place, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError):
        raise RecipeError(f"Override {key:.{MAX_SHOWN}}: the recipe has no such key.") from None


def recipe_text(recipe: Recipe) -> str:
    """Return the recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(exclude_none=True), sort_keys=False)


def digest(*parts: Any) -> str:
    """Return a short content hash of JSON-like values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
