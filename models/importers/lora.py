"""LoRA adapters of PEFT: a folder with the small matrices that training added to a base model, merged into that base.

An adapter names the base's modules, so it fits the base's own files, or an artifact of one. Source: Hu et al., LoRA (2021);
Kalajdzievski, rank-stabilized scaling (2023); the layout is PEFT's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import regex
from pydantic import BaseModel, ValidationError
from torch import Tensor

from clipress.artifact import HEADER, WEIGHTS, load_artifact
from clipress.errors import ArtifactError
from clipress.models import surgery
from clipress.models.importers.openai import model_from_weights
from clipress.models.importers.transformers import renamed, their_names
from clipress.models.load import Model, build, rebuild, refuse_absurd
from clipress.models.weightless import build_weightless
from clipress.models.weights_file import State, weights_from_file
from clipress.recipe import first_problem
from clipress.storage import read_json

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."  # what PEFT's wrappers put before the base's names
PAIRS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""How A and B may have started. Other starts, such as PiSSA's, change the base's weights too."""
NO_MATTER = {
    *("r", "rank_pattern", "lora_dropout", "bias", "modules_to_save", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "ensure_weight_tying", "eva_config", "qalora_group_size"),
    *("task_type", "auto_mapping", "inference_mode", "peft_version", "revision", "megatron_core", "runtime_config"),
    "fan_in_fan_out",  # PEFT ignores it for every module that a CLIP has
}
"""Settings that say how an adapter was trained, or what its tensors show anyway."""
SECONDS = 1.0  # for a pattern of the config on one name


class _Config(BaseModel, extra="allow"):
    peft_type: str
    base_model_name_or_path: str | None = None
    lora_alpha: float = 8
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    init_lora_weights: bool | str = True


@dataclass(frozen=True)
class Adapter:
    """The tensors of an adapter by the base's names, and how much of each product is added."""

    folder: Path
    file: Path
    config: _Config
    state: State

    @property
    def files(self) -> list[Path]:
        """The files that determine it."""
        return [self.file, self.folder / CONFIG]

    def described(self, base: Path) -> str:
        """Say what was done."""
        pairs = sum(name.endswith(tuple(PAIRS)) for name in self.state)
        return f"LoRA of {pairs} modules merged into {base.name}"

    def fits(self, base: State) -> bool:
        """Return whether the base has every tensor that the adapter changes."""
        return all(_target(name) in base for name in self.state)

    def merged(self, base: State) -> dict[str, Tensor]:
        """Return the base's weights with every product B A added, times its scale, and whole tensors replaced.

        Raises ArtifactError for a tensor that is not LoRA's, has no place in the base or does not fit there.
        """
        found = dict(base)
        whole = {name: one for name, one in self.state.items() if ".lora_" not in name}
        for name, tensor in whole.items():  # first, since a table of tokens may be saved beside its pair
            _fitting(name, tensor, found)
            found[name] = tensor
        pairs = [name for name in self.state if name.endswith(tuple(PAIRS))]
        seconds = [name.replace(first, second) for name in pairs for first, second in PAIRS.items() if first in name]
        if strange := sorted(self.state.keys() - whole.keys() - {*pairs, *seconds}):
            raise ArtifactError(f"expected plain LoRA, found {strange[0]}. {MERGE_THERE}")
        for name, other in zip(pairs, seconds, strict=True):
            target, product = _target(name), self._product(name, other)
            if f"{name.partition('.lora_')[0]}.in_proj_weight" in found:  # PEFT adds the product of its out_proj twice
                raise ArtifactError(f"expected plain LoRA, found it on torch's own attention, {name}. {MERGE_THERE}")
            if (
                target in found and product.shape == found[target].flatten(1).shape
            ):  # a convolution's kernel is a matrix here
                product = product.reshape(found[target].shape)
            _fitting(target, product, found)
            found[target] = found[target] + product
        return found

    def _product(self, first: str, second: str) -> Tensor:
        if second not in self.state:
            raise ArtifactError(f"its {second} is missing: the adapter's file is incomplete.")
        a, b = self.state[first], self.state[second]
        if min(a.ndim, b.ndim) < 2 or b.shape[1] != len(a):
            raise ArtifactError(f"its {first} {list(a.shape)} and {second} {list(b.shape)} have no rank in common.")
        a, b = a.flatten(1), b.flatten(1)
        product = b @ a * self._scale(first.partition(".lora_")[0], len(a))
        return product.T if "lora_embedding" in first else product

    def _scale(self, module: str, rank: int) -> float:
        alpha = self.config.lora_alpha
        for pattern, own in (self.config.alpha_pattern or {}).items():
            try:
                if regex.match(rf"(.*\.)?({pattern})$", module, timeout=SECONDS):
                    alpha = own
                    break
            except (regex.error, TimeoutError) as error:
                raise ArtifactError(f"its alpha_pattern '{pattern:.100}' cannot be used: {error}.") from None
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank)


MERGE_THERE = (
    "Merge it with peft, `PeftModel.from_pretrained(base, ADAPTER).merge_and_unload().save_pretrained(FOLDER)`, and import "
    "that folder."
)


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter of PEFT."""
    return (folder / CONFIG).is_file()


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's folder. Raises ArtifactError if it is damaged or not plain LoRA."""
    try:
        config = _Config.model_validate(read_json(folder / CONFIG))
    except ValidationError as error:
        raise ArtifactError(f"its {CONFIG}, {first_problem(error)}.") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"its {CONFIG} is not readable JSON: {error}.") from None
    others = {name: value for name, value in (config.model_extra or {}).items() if value and name not in NO_MATTER}
    if config.peft_type != "LORA":
        raise ArtifactError(f"expected plain LoRA, found peft_type {config.peft_type!r:.50}. {MERGE_THERE}")
    if others or config.init_lora_weights not in PLAIN_STARTS:
        found = ", ".join(others) or f"init_lora_weights '{config.init_lora_weights:.50}'"
        raise ArtifactError(f"expected plain LoRA, found {found}. {MERGE_THERE}")
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise ArtifactError(f"expected the adapter's weights in its folder ({' or '.join(FILES)}), found none.")
    state = weights_from_file(file).state
    return Adapter(folder, file, config, {_base_name(name): tensor for name, tensor in state.items()})


def base_of(adapter: Adapter, given: Path | None) -> Path:
    """Return the base's folder: the given one, or the one that the adapter names if it is on this machine."""
    named = adapter.config.base_model_name_or_path
    base = given or Path(named or "")
    if not (given or named) or not base.is_dir():
        names = f"'{given}' is no folder" if given else f"it names '{named}'" if named else "it names none"
        raise ArtifactError(
            f"an adapter (PEFT) needs the model it was trained on, and {names}. Name that model's folder, or its artifact: "
            "--base FOLDER"
        )
    return base


def with_adapter(folder: Path, adapter: Adapter) -> tuple[Model, tuple[Mapping[str, Any], ...], Path]:
    """Return the model of a base artifact with an adapter merged in, the artifact's lineage, and its weights file.

    The adapter may name modules as open_clip does, or as transformers' CLIPModel.
    """
    artifact = load_artifact(folder)
    refuse_absurd(artifact.architecture)
    model = rebuild(artifact, build)
    uncut = surgery.shapes(build_weightless(lambda: build(model.architecture)))
    if model.quantization or model.sparsity or surgery.shapes(model.module) != uncut:
        raise ArtifactError(f"its base {folder} is compressed. Merge the adapter into the model before compression.")
    stock = surgery.stock_weights(model.module)
    merged = adapter.merged(stock) if adapter.fits(stock) else renamed(adapter.merged(their_names(stock)))
    made = model_from_weights(artifact.architecture, merged, artifact.preprocess)
    return replace(made, tokenizer=model.tokenizer), artifact.lineage, folder / WEIGHTS


def is_artifact(folder: Path) -> bool:
    """Return whether a folder is an artifact."""
    return (folder / HEADER).is_file()


def _base_name(name: str) -> str:
    """Return the base's name of an adapter's tensor; PEFT wraps the modules that it changes."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")


def _target(name: str) -> str:
    """Return the base's tensor that a tensor of an adapter changes."""
    module, is_pair, _ = name.partition(".lora_")
    return f"{module}.weight" if is_pair else name


def _fitting(name: str, tensor: Tensor, base: State) -> None:
    if name not in base or base[name].shape != tensor.shape:
        found = list(base[name].shape) if name in base else "no such tensor"
        raise ArtifactError(
            f"the adapter has {name} {list(tensor.shape)}, the base {found}. Name the base that it was trained on."
        )
