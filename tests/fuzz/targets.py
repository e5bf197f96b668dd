"""Fuzz targets: bytes in, nothing or a ClipressError out. Any other exception is a finding.

The first byte chooses which reader is tried and whether the rest is the file itself or edits to a good one: bytes that
are mutated blindly seldom get past a parser.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import yaml
from helpers import RECIPE
from PIL import Image
from safetensors.torch import save

from clipress.errors import ClipressError

HOSTILE = [
    None, True, False, 0, -1, 1, 2, 3, 1 << 16, 1 << 31, 1 << 63, 10**30, -(1 << 63), 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "a", "../x", "/etc/passwd", "a\0b", "\ud800", "x" * 5000, "1", "nan", [], {}, [[]], [None], [0], ["a"],
    {"a": 1}, {"": {}}, [1, 2, 3], {"name": "a", "format": "csv"}, "0" * 16, "{0..99999999999}.tar", "hf-hub:a/b", "train",
]  # fmt: skip


def edited(tree: Any, data: bytes) -> Any:
    """Return a copy of a tree of lists and mappings with one change per three bytes: two for the place, one for the change."""
    tree = [copy.deepcopy(tree)]
    for at in range(0, min(len(data) - 2, 24), 3):
        places = [(tree, 0)]
        for holder, key in places:
            inner = holder[key]
            keys = list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
            places += [(inner, one) for one in keys][: 4000 - len(places)]
        holder, key = places[int.from_bytes(data[at : at + 2], "little") % len(places)]
        what = data[at + 2]
        if what < 200:
            holder[key] = copy.deepcopy(HOSTILE[what % len(HOSTILE)])
        elif what < 220 and holder is not tree:
            del holder[key]
        elif what < 240 and isinstance(holder, dict):
            holder[f"x{what}"] = holder[key]
        elif isinstance(holder, list) and holder is not tree:
            holder.append(holder[key])
    return tree[0]


def folder() -> Path:
    """Return a fresh folder, in memory if possible."""
    home = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="clipress-fuzz-", dir=home if home.is_dir() else None))


HOME = folder()
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CLIPRESS_CACHE"] = "/dev/null/none"  # One index per input would fill the disk.


def recipe(data: bytes) -> None:
    """Read YAML into a plan with every section validated."""
    from clipress.recipe import read_recipe, recipe_text
    from clipress.workflow.plan import plan_from

    path, (kind, rest) = HOME / "r.yaml", (data[0] if data else 0, data[1:])
    if kind % 2:
        rest = yaml.safe_dump(edited(RECIPE, rest)).encode("utf-8", "surrogatepass")
    path.write_bytes(rest)
    try:
        read = read_recipe(path)
        path.write_text(recipe_text(read), encoding="utf-8")
        assert read_recipe(path) == read
        plan_from(read)
    except ClipressError as error:
        assert len(str(error)) < 20_000


def small() -> dict[str, Any]:
    """Return the smallest architecture."""
    tower = {"width": 64, "layers": 1}
    vision = {**tower, "image_size": 8, "patch_size": 4, "head_width": 64}
    return {
        "embed_dim": 8,
        "vision_cfg": vision,
        "text_cfg": {**tower, "context_length": 8, "vocab_size": 16, "heads": 1},
    }


def saved() -> Path:
    """Write a small artifact, once."""
    from clipress.artifact import save_artifact
    from clipress.models.load import artifact_from_model, new_model

    lineage = ({"stage": "a", "hash": "b"},)
    return save_artifact(artifact_from_model(new_model(small(), 0), lineage, {"accuracy": {}}), HOME / "artifact")


EXPORT = {
    "schema_version": 1, "stage": "a", "precision": "fp32", "embed_dim": 8, "logit_scale": 1.0, "logit_bias": None,
    "preprocess": {"size": 8}, "tokenizer": {"name": "clip-bpe", "context_length": 8, "kwargs": {}}, "lineage_hash": "b",
    "files": {tower: {"file": f"{tower}.onnx", "sha256": "0", "bytes": 1} for tower in ("image", "text")},
}  # fmt: skip
SIDECAR = {
    "schema_version": 1, "tower": "image", "precision": "fp16", "tensorrt": "10.16", "gpu": "g", "compute_capability": [9, 0],
    "version_compatible": False, "hardware_compatibility": "none", "onnx_sha256": "0", "plan_sha256": "0", "settings": {},
    "profile": {"min": [1, 3], "opt": [1, 3], "max": [2, 3]}, "sparse_layers": {}, "model": {}, "parity": {}, "clipress": "1",
}  # fmt: skip
MANIFEST = {
    "schema_version": 2, "teacher": "t", "logit_scale": 1.0, "preprocess": {"size": 8}, "tokenizer": {}, "source": "s",
    "fingerprint": "f", "items": 3, "augment": {}, "views": 1, "dim": 8, "dtype": "fp16", "precision": "fp32",
    "items_per_shard": 2, "made_with": {},
}  # fmt: skip
SHARD = {"items": 2, "captions": 2, "texts": 2, "failed": 0, "files": {}}


def artifact(data: bytes) -> None:
    """Artifacts, export folders, engine sidecars and teacher caches: edited or raw headers, raw weights."""
    from clipress.artifact import load_artifact
    from clipress.data.cache_files import Manifest
    from clipress.data.teacher_cache import TeacherCache, read_manifest
    from clipress.runtime.export_folder import read_export
    from clipress.runtime.tensorrt import load_engine
    from clipress.tasks import model_from_artifact

    if not (HOME / "artifact").is_dir():
        saved()
        (HOME / "e.engine").write_bytes(b"plan")
    home, (kind, rest) = HOME / "artifact", (data[0] if data else 0, data[1:])
    header, weights = HOME / "clipress.json", HOME / "model.safetensors"
    good = json.loads((home / "clipress.json").read_text())

    def written(tree: Any, path: Path) -> Path:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(rest if kind & 8 else json.dumps(edited(tree, rest)).encode())
        return path

    try:
        if kind % 8 == 0:
            weights.write_bytes((home / "model.safetensors").read_bytes())
            written(good, header)
            model_from_artifact(HOME)
        elif kind % 8 == 1:
            weights.write_bytes(rest)
            header.write_text(json.dumps(good | {"weights_sha256": hashlib.sha256(rest).hexdigest()}))
            load_artifact(HOME)
        elif kind % 8 in (2, 3):
            weights.write_bytes((home / "model.safetensors").read_bytes())
            shapes = edited({key: good[key] for key in ("architecture", "shapes", "preprocess", "tokenizer")}, rest)
            header.write_text(json.dumps(good | shapes if isinstance(shapes, dict) else good))
            model_from_artifact(HOME)
        elif kind % 8 == 4:
            read_export(written(EXPORT, HOME / "export.json").parent)
        elif kind % 8 == 5:
            written(SIDECAR, HOME / "e.engine.json")
            load_engine(HOME / "e.engine")
        else:
            path = written(MANIFEST, HOME / "cache" / "manifest.json")
            try:
                read_manifest(path.parent)
            finally:
                tree = json.loads(path.read_text())
                named = HOME / Manifest.model_validate(tree).key
                named.mkdir(exist_ok=True)
                path.replace(named / "manifest.json")
                TeacherCache.open(named)
    except ClipressError:
        pass
    except ValueError:
        if kind % 8 < 6:
            raise  # Otherwise the harness failed to name the cache.


IMPORT_FORMATS = ("auto", "openai", "clip-kd", "tinyclip", "upop")
EDITED_PICKLE = 25


def importers(data: bytes) -> None:
    """Checkpoints: raw pickles, edited ones, safetensors and folders, and state dicts with changed names and shapes."""
    from clipress.models.importers import import_checkpoint

    kind, rest = data[0] if data else 0, data[1:]
    state = importers.__dict__.setdefault("state", open_clip.model.CLIP(**small()).state_dict())
    try:
        if kind == EDITED_PICKLE:
            (HOME / "c.pth").write_bytes(_with_edited_pickle(rest))
            import_checkpoint(HOME / "c.pth")
        elif kind % 5 == 0:
            (HOME / "a.pth").write_bytes(rest)
            import_checkpoint(HOME / "a.pth")
        elif kind % 5 == 1:
            (HOME / "a.safetensors").write_bytes(rest)
            import_checkpoint(HOME / "a.safetensors", "openai")
        elif kind % 5 == 2:
            home = HOME / "folder"
            home.mkdir(exist_ok=True)
            if not (home / "open_clip_model.safetensors").is_file():
                (home / "open_clip_model.safetensors").write_bytes(save(state))
            config = {"model_cfg": small(), "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "interpolation": "bicubic"}}
            (home / "open_clip_config.json").write_text(json.dumps(edited(config, rest)))
            import_checkpoint(home)
        else:
            torch.save(_other(state, rest), HOME / "b.pth")
            form = IMPORT_FORMATS[kind // 5 % len(IMPORT_FORMATS)]
            import_checkpoint(HOME / "b.pth", form)
    except ClipressError:
        pass


def _with_edited_pickle(data: bytes) -> bytes:
    """Return a checkpoint whose pickle has one byte replaced, or inserted, per three bytes of data."""
    buffer, edited = io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": {"visual.proj": torch.ones(2, 3)}, "args": argparse.Namespace(lr=1)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(edited, "w") as new:
        for name in old.namelist():
            content = bytearray(old.read(name))
            for at in range(0, len(data) - 2 if name.endswith("data.pkl") else 0, 3):
                place = int.from_bytes(data[at : at + 2], "little")
                content[place % len(content) : place % len(content) + place % 2] = data[at + 2 : at + 3]
            new.writestr(name, bytes(content))
    return edited.getvalue()


CHANGES = (
    lambda name, t, a, b: {name: torch.zeros((a, b))},
    lambda name, t, a, b: {name: t.reshape(-1)[: a * b]},
    lambda name, t, a, b: {name: t[:a] if t.ndim else t},
    lambda name, t, a, b: {name: t.expand(a, *t.shape)},
    lambda name, t, a, b: {name: torch.zeros(1).expand(a * 4096 + 1, b + 1)},
    lambda name, t, a, b: {name: t.half()},
    lambda name, t, a, b: {name: t.to(torch.int64)},
    lambda name, t, a, b: {name: t * float("nan")},
    lambda name, t, a, b: {name: a},
    lambda name, t, a, b: {f"module.{name}": t},
    lambda name, t, a, b: {name.replace("resblocks.0", f"resblocks.{a * b}"): t},
    lambda name, t, a, b: {name: t, f"visual_m.{name}": t},
    lambda name, t, a, b: {name: t, "_image_encoder.module.visual.x": t},
    lambda name, t, a, b: {name: t, **{f"transformer.resblocks.{n}.x": torch.ones(1) for n in range(a * 8)}},
    lambda name, t, a, b: {name: t, "input_resolution": b},
    lambda name, t, a, b: {},
)


def _other(state: dict[str, Any], data: bytes) -> dict[str, Any]:
    """Return weights with one change per four bytes: which tensor, what change and two numbers."""
    state = dict(state)
    for at in range(0, min(len(data) - 3, 16), 4):
        which, what, a, b = data[at : at + 4]
        name = sorted(state)[which % len(state)] if state else "x"
        tensor = state.pop(name, torch.ones(1))
        if not isinstance(tensor, torch.Tensor) or tensor.numel() > 1 << 20:
            continue
        state |= CHANGES[what % len(CHANGES)](name, tensor, a, b)
    return {"state_dict": state} if len(data) % 2 else state


KARPATHY = [{"image": "a.png", "caption": "a", "image_id": 1}, {"image": "a.png", "caption": ["b", "c"]}]
COCO = {
    "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "a.png"}],
    "annotations": [{"image_id": 1, "caption": "a"}, {"image_id": 2, "caption": "b"}],
}
NLVR2 = [{"images": ["a.png", "a.png"], "sentence": "a", "label": label} for label in ("True", "False")]
VQA = [
    {"image": "a.png", "question": "a", "answer": ["b", "b", "c"], "dataset": "vqa", "question_id": 1},
    {"image": "a.png", "question": "b", "answer": "c", "dataset": "vg"},
]
EDITED = {"karpathy": KARPATHY, "coco": COCO, "nlvr2": NLVR2, "vqa": VQA}


FORMS = (
    "csv", "csv", "karpathy", "coco", "captions", "images", "webdataset", "prompts", "image", "karpathy", "coco",
    "nlvr2", "vqa",
)  # fmt: skip


def annotations(data: bytes) -> None:
    """Tables, JSON, tars, lists and images; every record of a source that opens is read."""
    from clipress.data.formats.webdataset import Shards
    from clipress.data.prompts import check_labels, read_classes, read_prompts
    from clipress.data.sources import FORMATS
    from clipress.data.spec import SourceSpec
    from clipress.data.tokens import tokenizer_from_spec
    from clipress.data.transforms import Preprocess, fitted, open_image

    kind, rest = data[0] if data else 0, data[1:]
    path = HOME / "annotations"
    if not (HOME / "a.png").is_file():
        buffer = io.BytesIO()
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(buffer, "PNG")
        (HOME / "a.png").write_bytes(buffer.getvalue())
    path.write_bytes(rest)
    chosen = FORMS[kind % len(FORMS)]
    try:
        if chosen == "image":
            fitted(open_image(rest), Preprocess(size=8))
            return
        if chosen == "prompts":
            check_labels(read_classes(path).names)
            (HOME / "p.json").write_bytes(rest)
            read_prompts(HOME / "p.json")
            return
        if kind % len(FORMS) > 8:
            path.write_text(json.dumps(edited(EDITED[chosen], rest)))
        spec = SourceSpec(format=chosen, annotations=path, images=HOME, separator="," if kind % len(FORMS) else "\t")
        source = Shards(spec.model_copy(update={"shards": "x"}), [path], None) if chosen == "webdataset" else None
        source = source or FORMATS[chosen](spec)
        tokenize = annotations.__dict__.setdefault(
            "tokenize", tokenizer_from_spec({"name": "clip-bpe", "context_length": 8})
        )
        for index in range(min(len(source), 20)):
            try:
                captions = source.captions(index)
                if captions:
                    tokenize(captions)
                if source.has_images:
                    fitted(source.image(index), Preprocess(size=8))
                if chosen == "nlvr2":
                    assert source.label(index) in (0, 1) and source.other_image(index)
                if chosen == "vqa":
                    assert sum(source.answer_weights(index).values()) < 1 + 1e-9
            except ClipressError:
                pass
    except ClipressError:
        pass


KINDS = {recipe: 2, artifact: 16, importers: EDITED_PICKLE + 1, annotations: len(FORMS)}
"""Number of values of the first byte that select different inputs, per target."""
