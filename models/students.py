"""Build the model to be trained from a recipe's `student` section.

    student: {model: ViT-B-16}                                  an open_clip name
    student: {image: vit-t-16, text: clip-kd}                   two towers, by name, size or config
    student: {image: {timm: resnet18, checkpoint: FILE}, text: 12x384}  a tower that starts from a timm file
    student: {image: {timm: resnet18}, text: teacher}           one tower new, the other a frozen copy of the teacher's
    student: {inherit: {image: {layers: 6}, text: {ffn: 512}}}  cut out of the teacher (models/weight_inheritance.py)
    student: {embed_dim: 512, vision_cfg: {...}, text_cfg: {...}}  a full open_clip config

With a teacher, the student shares its tokenizer, and its preprocessing unless it has weights of its own; the teacher's image and
embedding sizes are the defaults. With another image size, both see the same views, each in its own size.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import nn

from clipress.errors import RecipeError, nearest
from clipress.models import anatomy, surgery
from clipress.models.importers import local_folder, model_named
from clipress.models.load import Model, new_model
from clipress.models.named_towers import IMAGE_TOWERS, TEXT_TOWERS, timm_tower
from clipress.models.open_clip_config import config_named
from clipress.models.timm_weights import load_timm_weights
from clipress.models.weight_inheritance import Size, inherited
from clipress.models.weights_file import Which
from clipress.recipe import Section, checked, digest
from clipress.storage import sha256

TEACHER = "teacher"
# These depend on the tokenizer, and so on the teacher, but not on the size of the tower.
TOKENS = (
    *("context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"),
    *("pool_type", "pad_id", "eos_id", "no_causal_mask"),
)


class Inherit(Section):
    """What the student keeps of each of the teacher's towers; a missing tower is kept entirely."""

    image: Size | None = None
    text: Size | None = None

    def sizes(self) -> dict[str, Size]:
        """Return the towers that change."""
        return {tower: size for tower in anatomy.TOWERS if (size := getattr(self, tower)) is not None}


class Student(Section):
    """The `student` section, unless it is a full open_clip config: exactly one of model, image with text, inherit."""

    model: str | None = None
    """An open_clip model name, or local-dir:FOLDER for a folder that `clipress import` reads, with its weights."""
    checkpoint: str | None = None
    """With `model`: a weights file, or a pretrained tag of open_clip. Default: random weights."""
    weights: Which | None = None
    """With a file or folder: raw or averaged weights (`ema`). Default: raw ones if there are any."""
    image: str | dict[str, Any] | None = None
    """A name of `named_towers.IMAGE_TOWERS`; vit-LAYERSxWIDTH-pPATCH; {timm: NAME}, with `pretrained: true` for timm's own weights or
    `checkpoint: FILE` for a timm file; keys of
    open_clip's vision_cfg; or `teacher`."""
    text: str | dict[str, Any] | None = None
    """A name of `named_towers.TEXT_TOWERS`; LAYERSxWIDTH; keys of open_clip's text_cfg; or `teacher`."""
    embed_dim: int | None = Field(None, ge=1)
    """Default: the model's own; of two towers the teacher's, or 512 without a teacher."""
    image_size: int | None = Field(None, ge=1)
    """In pixels. Default: the teacher's; without a teacher the model's own, or 224 of two towers. The teacher sees images in its
    own size."""
    inherit: Inherit | None = None

    def model_post_init(self, _: Any) -> None:
        towers = self.image is not None or self.text is not None
        given = [k for k, v in (("model", self.model), ("image and text", towers), ("inherit", self.inherit)) if v]
        if len(given) != 1:
            raise RecipeError(
                "student: expected exactly one of model, image with text, inherit, or a full open_clip config "
                f"(vision_cfg, text_cfg); found {' and '.join(given) or 'none'}."
            )
        if towers and (self.image is None or self.text is None):
            raise RecipeError(
                f"student: expected both towers, found {'text' if self.image is None else 'image'} alone."
            )
        if self.image == self.text == TEACHER:
            raise RecipeError(
                "student: both towers are the teacher's. Leave out 'student' to start from a copy of the teacher."
            )
        if self.checkpoint is not None and self.model is None:
            raise RecipeError("student.checkpoint: it is used with 'model'. Set model, or leave out checkpoint.")
        if self.weights is not None and not self.has_weights:
            raise RecipeError("student.weights: it is used with weights of others. Set checkpoint, or leave it out.")
        fixed = self.inherit is not None or self.has_weights
        if fixed and (self.embed_dim or self.image_size):
            source = "the teacher" if self.inherit is not None else "the checkpoint"
            raise RecipeError(f"student: embed_dim and image_size are {source}'s. Leave them out.")
        if self.inherit is not None and not self.inherit.sizes():
            raise RecipeError(
                "student.inherit: expected sizes of image or text (layers, heads, width, ffn), found none."
            )

    @property
    def has_weights(self) -> bool:
        """Whether the whole model starts from weights that others trained."""
        return (self.checkpoint or "random") != "random" or local_folder(self.model) is not None


def check(raw: Mapping[str, Any], has_teacher: bool) -> None:
    """Check a recipe's section before anything is built. Raises RecipeError."""
    if _is_config(raw):
        return
    student = checked(Student, raw, "student")
    if not has_teacher and (student.inherit is not None or towers_of_teacher(raw)):
        raise RecipeError("student: it is made from the teacher, and the recipe has no 'teacher'. Add that section.")
    if student.image is not None:
        _own_towers(student)


def student_from(raw: Mapping[str, Any], teacher: Model | None, seed: int) -> Model:
    """Build the student of a recipe; its random weights depend on the seed alone.

    Raises RecipeError for a section that is invalid or does not fit the teacher.
    """
    check(raw, teacher is not None)
    if _is_config(raw):
        model = new_model(dict(raw), seed)
        if teacher is None:
            return model
        return replace(model, preprocess=teacher.preprocess.model_copy(update={"size": model.preprocess.size}))
    student = checked(Student, raw, "student")
    if teacher is not None and teacher.quantization and (student.inherit or towers_of_teacher(raw)):
        raise RecipeError(
            "student: the teacher is INT8, and its towers cannot be trained. Use the artifact before quantization."
        )
    if student.inherit is not None:
        return inherited(teacher, student.inherit.sizes())
    model = _of_two_towers(student, teacher, seed) if student.model is None else _named(student, teacher, seed)
    if teacher is None:
        return model
    return _shared(model, teacher, keeps_preprocess=student.has_weights)


def towers_of_teacher(raw: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the towers that a section copies from the teacher and that training leaves frozen."""
    return tuple(tower for tower in anatomy.TOWERS if raw and raw.get(tower) == TEACHER)


def start_hash(raw: Mapping[str, Any], seed: int) -> str:
    """Hash a student's starting point without the teacher (which every stage records): section, seed and weights."""
    model = raw.get("model")
    folder = local_folder(model) if isinstance(model, str) else None
    files = [Path(str(raw.get("checkpoint"))), _timm_file(raw.get("image"))]
    files += [] if folder is None else sorted(folder.rglob("*"))
    return digest("start", raw, seed, *(sha256(file) for file in files if file is not None and file.is_file()))


def without_weights(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section of the same sizes that reads no weights, to find out what a student would need."""
    made = copy.deepcopy(dict(raw))
    if "checkpoint" in made and isinstance(made.get("model"), str) and local_folder(made["model"]) is None:
        made["checkpoint"] = "random"
    for tower, keys in (("image", ("pretrained", "checkpoint")), ("vision_cfg", ("timm_model_pretrained",))):
        if isinstance(made.get(tower), dict):
            made[tower] = {key: value for key, value in made[tower].items() if key not in keys}
    return made


def freeze(model: nn.Module, towers: Iterable[str]) -> None:
    """Freeze the towers' parameters, in place."""
    for tower in towers:
        for parameter in anatomy.tower_parameters(model, tower):
            parameter.requires_grad_(False)


def eval_frozen_modules(model: nn.Module) -> None:
    """Put modules without trained parameters into evaluation mode, in place, so that their norms keep their statistics."""
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def _timm_file(image: Any) -> Path | None:
    """Return the timm checkpoint that an image tower starts from, if any."""
    has_file = isinstance(image, Mapping) and "timm" in image and "checkpoint" in image
    return Path(str(image["checkpoint"])) if has_file else None


def _is_config(raw: Mapping[str, Any]) -> bool:
    return not raw.keys().isdisjoint({"vision_cfg", "text_cfg"})


def _named(student: Student, teacher: Model | None, seed: int) -> Model:
    """Build a model by its open_clip name."""
    import open_clip

    if student.has_weights:
        return model_named(student.model, student.checkpoint, "student", student.weights)
    config = config_named(student.model)
    if config is None:
        raise RecipeError(
            f"student: open_clip has no model '{student.model}'.{nearest(student.model, open_clip.list_models())}"
        )
    size = student.image_size or (teacher.preprocess.size if teacher else config["vision_cfg"].get("image_size", 224))
    config["vision_cfg"]["image_size"] = size
    config["vision_cfg"].pop("timm_model_pretrained", None)
    encoder = config["text_cfg"].get("hf_model_name")
    if encoder and teacher and teacher.tokenizer["name"] != config["text_cfg"].get("hf_tokenizer_name"):
        raise RecipeError(
            f"student: the text tower of {student.model}, {encoder}, has a tokenizer of its own; the teacher's is "
            f"'{teacher.tokenizer['name']}'. Choose a student whose text tower can have the teacher's, such as ViT-B-32."
        )
    config["text_cfg"] |= _tokens(teacher)
    config["embed_dim"] = student.embed_dim or config["embed_dim"]
    return new_model(config, seed)


def _of_two_towers(student: Student, teacher: Model | None, seed: int) -> Model:
    """Build image and text tower from their descriptions, and copy those taken from the teacher."""
    own, taken = _own_towers(student), [t for t in anatomy.TOWERS if getattr(student, t) == TEACHER]
    theirs = teacher.architecture if teacher else {}
    size = student.image_size or (teacher.preprocess.size if teacher else 224)
    if "image" in taken:
        _refuse_other("image size, as the image tower is its own", size, teacher.preprocess.size)
    width = student.embed_dim or theirs.get("embed_dim", 512)
    if taken and width != theirs["embed_dim"]:
        raise RecipeError(
            f"student.embed_dim: expected {theirs['embed_dim']}, as the {taken[0]} tower is the teacher's; found {width}."
        )
    tokens = _tokens(teacher)
    for key in own.get("text", {}).keys() & tokens.keys():
        if own["text"][key] != tokens[key]:
            raise RecipeError(
                f"student.text.{key}: expected the teacher's {tokens[key]!r}, found {own['text'][key]!r}. Leave it out."
            )
    made = {
        "embed_dim": width,
        "vision_cfg": {**own.get("image", {}), "image_size": size},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, **tokens, **own.get("text", {})},
    }
    if taken:  # Shared keys come with any tower; the form of the text tower comes with the text tower.
        beside = theirs.keys() - made.keys() - ({"custom_text"} if "text" not in taken else set())
        made |= {key: copy.deepcopy(theirs[key]) for key in beside}
        made |= {key: copy.deepcopy(theirs[key]) for key in (anatomy.CONFIG_KEYS[tower] for tower in taken)}
    model = new_model(made, seed)
    if file := _timm_file(student.image):
        load_timm_weights(model.module, file)
    for tower in taken:
        surgery.copy_tower(model.module, teacher.module, tower)
    if taken:  # The logit scale is the teacher's too.
        beside = {n: t for n, t in teacher.module.state_dict().items() if anatomy.tower_of(teacher.module, n) is None}
        model.module.load_state_dict(beside, strict=False)
    return model


def _shared(model: Model, teacher: Model, keeps_preprocess: bool) -> Model:
    """Return the student with the teacher's preprocessing, in its own size. Raises RecipeError if tokenizers differ."""
    _refuse_other("tokenizer", model.tokenizer, {k: v for k, v in teacher.tokenizer.items() if k in model.tokenizer})
    if "kept" in teacher.tokenizer:
        _refuse_other("number of tokens", int(model.module.vocab_size), int(teacher.module.vocab_size))
    own = teacher.preprocess.model_copy(update={"size": model.preprocess.size})
    return replace(model, preprocess=model.preprocess if keeps_preprocess else own, tokenizer=teacher.tokenizer)


def _refuse_other(what: str, own: Any, shared: Any) -> None:
    if own != shared:
        raise RecipeError(f"student: expected the teacher's {what}, {shared!s:.200}; found {own!s:.200}.")


def _tokens(teacher: Model | None) -> dict[str, Any]:
    """Return the settings of a text tower that follow from the teacher's tokenizer."""
    if teacher is None:
        return {}
    text = teacher.architecture["text_cfg"]
    known = {"context_length": teacher.tokenizer["context_length"], "vocab_size": int(teacher.module.vocab_size)}
    return known | {key: copy.deepcopy(text[key]) for key in TOKENS if key in text}


def _own_towers(student: Student) -> dict[str, dict[str, Any]]:
    """Return open_clip's settings of the towers that are not the teacher's."""
    configs = {"image": _image_config, "text": _text_config}
    given = {tower: getattr(student, tower) for tower in anatomy.TOWERS}
    return {tower: configs[tower](value) for tower, value in given.items() if value != TEACHER}


def _image_config(given: str | dict[str, Any]) -> dict[str, Any]:
    from open_clip.model import CLIPVisionCfg

    if isinstance(given, dict) and "timm" in given:
        if given.get("pretrained") and "checkpoint" in given:
            raise RecipeError("student.image: expected pretrained or checkpoint, found both. Leave one out.")
        more = {key: value for key, value in given.items() if key not in ("timm", "pretrained", "checkpoint")}
        given = timm_tower(given["timm"], timm_model_pretrained=bool(given.get("pretrained", False)), **more)
    if isinstance(given, dict):
        known = {field.name for field in fields(CLIPVisionCfg)}
        return _known_timm(
            _known_keys(given, known - {"image_size"}, {"timm", "pretrained", "checkpoint"}, "student.image")
        )
    if size := re.fullmatch(r"vit-(\d+)x(\d+)-p(\d+)", given):
        layers, width, patch = map(int, size.groups())
        return {"width": width, "layers": layers, "head_width": _head_width(width, "image"), "patch_size": patch}
    return _by_name(given, IMAGE_TOWERS, "student.image", "vit-12x192-p16 or {timm: NAME}")


def _text_config(given: str | dict[str, Any]) -> dict[str, Any]:
    from open_clip.model import CLIPTextCfg

    if isinstance(given, dict):
        return _known_keys(given, {field.name for field in fields(CLIPTextCfg)}, set(), "student.text")
    if size := re.fullmatch(r"(\d+)x(\d+)", given):
        layers, width = map(int, size.groups())
        return {"width": width, "heads": width // _head_width(width, "text"), "layers": layers}
    return _by_name(given, TEXT_TOWERS, "student.text", "12x384")


def _by_name(given: str, named: Mapping[str, dict[str, Any]], where: str, example: str) -> dict[str, Any]:
    if given not in named:
        names = nearest(given, [*named, TEACHER])
        raise RecipeError(
            f"{where}: expected the name of a tower, or a size such as {example}; found '{given}'.{names}"
        )
    return copy.deepcopy(named[given])


def _known_keys(given: dict[str, Any], known: set[str], sugar: set[str], where: str) -> dict[str, Any]:
    for key in given:
        if key == "image_size":
            raise RecipeError(f"{where}.image_size: it is a key of student, not of a tower. Set student.image_size.")
        if key not in known:
            raise RecipeError(f"{where}: unknown key '{key}'.{nearest(key, known | sugar)}")
    return dict(given)


def _known_timm(config: dict[str, Any]) -> dict[str, Any]:
    if "timm_model_name" in config:
        import timm

        name = str(config["timm_model_name"])
        if not timm.is_model(name):
            close = difflib.get_close_matches(name, timm.list_models(), n=3)
            raise RecipeError(f"student.image: timm has no model '{name}'. Near it: {', '.join(close) or 'nothing'}.")
    return config


def _head_width(width: int, tower: str) -> int:
    """Return 64, the head width of every CLIP, or 32 if 64 does not divide the width."""
    for head in (64, 32):
        if width and width % head == 0:
            return head
    raise RecipeError(
        f"student.{tower}: expected a width that is a multiple of 32, found {width}. Set heads in a mapping instead."
    )
