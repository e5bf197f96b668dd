"""Load a model by name, from a checkpoint or an artifact, ready for compression, and pack it again."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from clipress.artifact import Artifact
from clipress.data import packed_tokenizer
from clipress.data.cache_files import CacheSettings
from clipress.data.tokens import check_spec, tokenizer_from_spec, tokenizer_spec
from clipress.data.transforms import Preprocess, preprocess_from_open_clip
from clipress.errors import ArtifactError, RecipeError, first_line, nearest
from clipress.models import anatomy, mobileclip, quantizers, siglip_vit, surgery
from clipress.models.hf_text import HFText
from clipress.models.open_clip_config import config_named, embedding_weights, hub_config, is_coca
from clipress.models.position_tables import fit_position_tables
from clipress.models.text_length import accept_short_texts
from clipress.models.weightless import assign, build_weightless
from clipress.models.weights_file import NOTES, Which, weights_from_file
from clipress.recipe import Section, first_problem

# Upper bounds for a config; larger numbers are refused before modules or position tables are built.
LIMITS = {
    **dict.fromkeys(("layers", "num_layers", "num_hidden_layers", "encoder_layers"), 1 << 8),
    **dict.fromkeys(("context_length", "image_size", "patch_size"), 1 << 13),
}
LIMIT = 1 << 22
BIG_VISION = (".npz", ".npy")  # SigLIP's own files, which open_clip reads
STAND_IN = {"context_length": 2, "vocab_size": 2, "width": 8, "heads": 1, "layers": 1}
"""A text tower in the place of one that open_clip would fetch from the hub."""
UNPUBLISHED = "no weights of this model are published whose preprocessing is known"
log = logging.getLogger("clipress.models")


@dataclass(frozen=True)
class Model:
    """A model in memory with everything that must travel with it."""

    module: nn.Module
    architecture: dict[str, Any]
    preprocess: Preprocess
    tokenizer: dict[str, Any] | None
    sparsity: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    task: str = "clip"
    """A name in tasks.TASKS."""

    def copy(self) -> Model:
        """Return a copy whose weights can be changed."""
        return replace(self, module=copy.deepcopy(self.module))

    def tokenize(self) -> Callable | None:
        """Return this model's tokenizer, texts -> int64 ids [N, L]; None for a model that reads no texts."""
        return None if self.tokenizer is None else tokenizer_from_spec(self.tokenizer)


class TeacherSpec(Section):
    """The `teacher` section: exactly one of artifact, model or recipe."""

    artifact: Path | None = None
    """A folder with clipress.json."""
    model: str | None = None
    """An open_clip model name, or local-dir:FOLDER for a folder that `clipress import` reads, with its weights."""
    checkpoint: str | None = None
    """With `model`: a weights file, or a pretrained tag of open_clip, or `random` for random weights."""
    weights: Which | None = None
    """With a file or folder: raw or averaged weights (`ema`). Default: raw ones if there are any."""
    recipe: dict[str, Any] | None = None
    """A recipe that makes the teacher; its last artifact is cached and reused."""
    cache: CacheSettings | None = None
    """Embed the training data once and read the teacher's embeddings from disk; absent: the teacher runs at every step."""

    def model_post_init(self, _: Any) -> None:
        given = [key for key in ("artifact", "model", "recipe") if getattr(self, key) is not None]
        if len(given) != 1:
            raise RecipeError(
                f"teacher: expected exactly one of artifact, model, recipe; found {', '.join(given) or 'none'}."
            )
        if self.weights is not None and self.model is None:
            raise RecipeError("teacher.weights: it is used with 'model'. Set model, or leave out weights.")


def build(architecture: dict[str, Any], seed: int | None = None) -> nn.Module:
    """Build an open_clip model from its config, with our attention in every block and random weights."""
    from open_clip.model import CLIP, CustomTextCLIP

    config, text = copy.deepcopy(architecture), architecture.get("text_cfg", {})
    custom = config.pop("custom_text", False) or "hf_config" in text
    if "hf_config" in text:
        config["text_cfg"] = STAND_IN
    own = mobileclip.own_keys(config.get("vision_cfg"))
    for key in own:
        del config["vision_cfg"][key]
    try:
        siglip_vit.register(architecture.get("vision_cfg"))
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.manual_seed(seed)
            model = (CustomTextCLIP if custom else CLIP)(**config)
            if "hf_config" in text:
                model.text = HFText(text, config["embed_dim"])
                model.context_length, model.vocab_size = model.text.context_length, model.text.vocab_size
        mobileclip.apply(own, model)
        if _is_resized(model):  # open_clip keeps timm towers at their published size.
            model.visual.set_input_size(model.visual.image_size)
    except (TypeError, ValueError, AssertionError, KeyError) as error:
        raise RecipeError(f"open_clip cannot build a model from this config: {error}") from None
    return accept_short_texts(surgery.use_own_attention(model))


def refuse_absurd(architecture: Mapping[str, Any]) -> None:
    """Raise ArtifactError for a config with impossible numbers, or with a text tower from the hub and not its config."""
    text = architecture.get("text_cfg")
    encoder = text.get("hf_config", {}) if isinstance(text, Mapping) else {}
    for part in (architecture, architecture.get("vision_cfg"), text, encoder):
        if not isinstance(part, Mapping):
            raise ArtifactError("expected an open_clip config with mappings vision_cfg and text_cfg.")
        for key, value in part.items():
            for number in value if isinstance(value, list | tuple) else [value]:
                if isinstance(number, int | float) and not abs(number) <= LIMITS.get(key, LIMIT):
                    raise ArtifactError(f"{key}: expected at most {LIMITS.get(key, LIMIT):,}, found {number:.4g}.")
    if (hub := text.get("hf_model_name")) and not encoder:
        raise ArtifactError(f"its text tower comes from the hub's '{hub}'; clipress builds from the file alone.")


def _is_resized(model: nn.Module) -> bool:
    """Return whether the timm tower has another image size than its name implies, so that the size must be set."""
    trunk = getattr(model.visual, "trunk", None)
    return hasattr(trunk, "set_input_size") and anatomy.image_size(model) != tuple(trunk.default_cfg["input_size"][1:])


def new_model(architecture: dict[str, Any], seed: int) -> Model:
    """Build a CLIP to be trained from scratch: random weights, or timm's own with `timm_model_pretrained`.

    The config of the result has no such key, so loading the model later needs no download.
    """
    vision = architecture.get("vision_cfg") or {}
    pretrained = isinstance(vision, dict) and vision.get("timm_model_pretrained")
    try:
        model = build(architecture, seed)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        reason = first_line(error)
        raise RecipeError(
            f"timm's weights of {vision['timm_model_name']} cannot be loaded: {reason} Leave out 'pretrained' to start "
            "from random ones."
        ) from None
    if pretrained:
        architecture = {**architecture, "vision_cfg": {**vision, "timm_model_pretrained": False}}
    height, _ = anatomy.image_size(model)
    return Model(model, architecture, Preprocess(size=height), tokenizer_spec(architecture))


def model_from_open_clip(
    name: str, checkpoint: str | None, where: str = "teacher", which: Which | None = None
) -> Model:
    """Load a model by its open_clip name with weights from a file or a pretrained tag; `where` begins messages.

    `which` chooses raw or averaged weights of a file.
    """
    import open_clip
    from open_clip.transformer import QuickGELU
    from safetensors import SafetensorError

    config = config_named(name)
    if config is None:
        raise RecipeError(f"{where}: open_clip has no model '{name}'.{nearest(name, open_clip.list_models())}")
    if checkpoint is None:
        raise RecipeError(f"{where}: model '{name}' needs a checkpoint: a file, a pretrained tag, or 'random'.")
    pretrained = None if checkpoint == "random" else checkpoint
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained and pretrained not in tags and not Path(pretrained).is_file():
        raise ArtifactError(
            f"Checkpoint '{checkpoint}' of {name} is neither a file nor a pretrained tag. "
            f"Tags: {', '.join(tags) or 'none'}."
        )
    is_file = bool(pretrained) and pretrained not in tags
    has_choice = is_file and Path(pretrained).suffix not in BIG_VISION
    if which is not None and not has_choice:
        raise RecipeError(f"{where}.weights: '{checkpoint}' has one kind of weights only. Leave it out.")
    try:
        if pretrained is None:
            model = build(config)
        elif has_choice:
            weights = weights_from_file(Path(pretrained), which).state
            config = mobileclip.with_own_keys(config, weights)
            if not NOTES.isdisjoint(weights):  # OpenAI's own file, whatever the name says of its activation
                config["quick_gelu"] = True
            model = build_weightless(lambda: build(config))
            _load_weights(model, weights)
        else:
            model = _with_published_weights(name, config, pretrained)
    except ArtifactError as error:
        raise ArtifactError(f"Checkpoint '{checkpoint}': {error}") from None
    except (RuntimeError, OSError, ValueError, KeyError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise ArtifactError(
            f"Checkpoint '{checkpoint}' does not load into {name}: {first_line(error)} "
            "It may be truncated or belong to another model."
        ) from None
    if any(isinstance(module, QuickGELU) for module in model.modules()):
        config["quick_gelu"] = True
    preprocess = preprocess_from_open_clip(open_clip.get_model_preprocess_cfg(model))
    if is_file:  # which does not tell its own
        preprocess = preprocess.model_copy(update=agreed_preprocess(name))
    model = accept_short_texts(surgery.use_own_attention(model)).eval()
    return Model(model, config, preprocess, tokenizer_spec(config))


def _with_published_weights(name: str, config: dict[str, Any], tag: str) -> nn.Module:
    """Return a model with the weights of a tag, or of a file of big_vision's, which open_clip reads."""
    import open_clip

    if "hf_config" not in config["text_cfg"] and not is_coca(open_clip.get_model_config(name)):
        return open_clip.create_model(name, pretrained=tag, require_pretrained=True)
    published, model = open_clip.get_pretrained_cfg(name, tag), build_weightless(lambda: build(config))
    _load_weights(model, weights_from_file(Path(open_clip.download_pretrained(published))).state)
    model.visual.preprocess_cfg = {**published, "size": model.visual.image_size}  # where open_clip keeps it
    return model


def _load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights as open_clip does: Apple's names are converted, position tables resized to the model's sizes."""
    from open_clip.model import convert_to_custom_text_state_dict

    weights = embedding_weights(weights)
    state = {name: one for name, one in weights.items() if name not in NOTES}
    state = mobileclip.renamed(state, model) if mobileclip.is_apples(state) else state
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        if name in state and getattr(model, name, None) is not None:
            state[name] = state[name].reshape(getattr(model, name).shape)
    fit_position_tables(state, model)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    own = surgery.own_weights(model, state)
    assign(model, {name: tensor.to(dtypes.get(name, tensor.dtype)).contiguous() for name, tensor in own.items()})


def agreed_preprocess(name: str) -> dict[str, Any]:
    """Return the preprocessing that all published weights of an open_clip model share.

    Where they differ, or there are none, open_clip's default is the best guess, and that is said.
    """
    import open_clip

    configs = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    first, *others = configs or [{}]
    keys = sorted(Preprocess.model_fields.keys() & first.keys() - {"size"})
    agreed = {key: first[key] for key in keys if all(other.get(key) == first[key] for other in others)}
    guessed = ", ".join(key for key in keys if key not in agreed)
    if guessed or not configs:
        log.warning(
            "%s: %s; open_clip's default is used. If yours differ, say so: import a folder with open_clip_config.json.",
            *(name, f"published weights of this model differ in {guessed}" if guessed else UNPUBLISHED),
        )
    return agreed


def rebuild(artifact: Artifact, build: Callable[[dict[str, Any]], nn.Module]) -> Model:
    """Rebuild a model from its artifact by its task's `build`; outputs are bitwise those it was saved with.

    The artifact's tensors become the model's weights.
    """
    try:
        preprocess = Preprocess.model_validate(artifact.preprocess)
    except ValidationError as error:
        raise ArtifactError(f"The artifact's preprocess, {first_problem(error)}.") from None
    if artifact.tokenizer is not None:
        check_spec(artifact.tokenizer)
    _refuse_misfits(artifact, build)
    module = build_weightless(lambda: surgery.reshape(build(artifact.architecture), artifact.shapes))
    weights = dict(artifact.weights)
    if artifact.quantization:
        quantizers.restore(module, artifact.quantization, weights)
    try:
        assign(module, weights)
    except RuntimeError as error:
        raise ArtifactError(
            f"The artifact's weights do not fit its own shapes: {str(error).splitlines()[-1]}"
        ) from None
    return Model(
        module.eval(),
        artifact.architecture,
        preprocess,
        artifact.tokenizer,
        artifact.sparsity,
        artifact.quantization,
        artifact.task,
    )


def _refuse_misfits(artifact: Artifact, build: Callable[[dict[str, Any]], nn.Module]) -> None:
    """Compare every weight's shape with what architecture and shapes require, before memory is taken."""
    try:
        with torch.device("meta"):
            wanted = surgery.reshape(build(artifact.architecture), artifact.shapes).state_dict()
    except ArtifactError:
        raise
    except Exception as error:  # An invalid config can fail anywhere in the library that builds the model.
        reason = first_line(error)
        raise ArtifactError(f"The artifact's architecture cannot be built: {reason}.") from None
    for name, tensor in wanted.items():
        found = artifact.weights[name].shape if name in artifact.weights else None
        if found != tensor.shape:
            shape = "missing" if found is None else list(found)
            raise ArtifactError(
                f"The artifact's weights do not fit its own shapes: expected {name} {list(tensor.shape)}, found {shape}."
            )


def artifact_from_model(model: Model, lineage: tuple[dict[str, Any], ...], metrics: dict[str, Any]) -> Artifact:
    """Pack a model for saving."""
    quantizer_state = ("_quantizer._amax",)
    weights: dict[str, Tensor] = {
        name: tensor
        for name, tensor in model.module.state_dict().items()
        if "_quantizer." not in name or name.endswith(quantizer_state)
    }
    return Artifact(
        architecture=model.architecture,
        shapes=surgery.shapes(model.module),
        weights=weights,
        preprocess=model.preprocess.model_dump(mode="json"),
        tokenizer=model.tokenizer,
        sparsity=model.sparsity,
        quantization=model.quantization,
        task=model.task,
        lineage=lineage,
        metrics=metrics,
        counts=anatomy.counts(model.module),
    )


def save_for_open_clip(model: Model, folder: Path) -> bool:
    """Write a model so that plain open_clip loads it (`local-dir:FOLDER`).

    Returns False if it is cut, resized or INT8, crops the margin of its images, has a reduced vocabulary, a text tower that
    open_clip cannot name, or an image tower that timm has no name for.
    """
    uncut = surgery.shapes(build_weightless(lambda: build(model.architecture)))
    if (
        model.quantization
        or model.architecture["text_cfg"].keys() & {"hf_config", "hf_model_name"} == {"hf_config"}
        or mobileclip.own_keys(model.architecture["vision_cfg"])
        or siglip_vit.size_in(model.architecture.get("vision_cfg")) is not None
        or model.tokenizer.get("kept") is not None
        or model.preprocess.crop_pct < 1
        or _is_resized(model.module)
        or surgery.shapes(model.module) != uncut
    ):
        return False
    import json

    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: t.detach().cpu().contiguous() for name, t in surgery.stock_weights(model.module).items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    p = model.preprocess
    preprocess = {
        "mean": p.mean,
        "std": p.std,
        "interpolation": p.interpolation,
        "resize_mode": p.resize_mode,
        "fill_color": p.fill_color,
    }
    text = json.dumps({**hub_config(model.architecture), "preprocess_cfg": preprocess}, indent=2)
    (folder / "open_clip_config.json").write_text(text + "\n", encoding="utf-8")
    if packed_tokenizer.is_packed(model.tokenizer):
        packed_tokenizer.write_files(model.tokenizer, folder)
    return True
