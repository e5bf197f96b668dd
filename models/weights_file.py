"""Read named tensors from a third-party checkpoint without running any code in it, whatever they are wrapped in."""

from __future__ import annotations

import logging
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from clipress.artifact import read_tensors
from clipress.errors import ArtifactError, first_line
from clipress.models.torch_archive import Foreign, read_archive, read_legacy

NOTES = {"input_resolution", "context_length", "vocab_size"}  # Numbers next to the weights in OpenAI's files.
RAW = ("state_dict", "model_state_dict", "model", "module")
EMA = ("state_dict_ema", "ema_state_dict", "model_ema")
WRAPPERS = ("module.", "_orig_mod.")  # of DDP and torch.compile
TRAINERS = ("model.", "clip.")  # attributes that hold the CLIP in a larger module
LEFT_OVERS = {"attn_mask", "position_ids"}  # buffers of older versions, which every model makes for itself
MAX_SIDE, MAX_TENSORS, MAX_BYTES, MAX_DEPTH = 1 << 20, 1 << 16, 32_000_000_000, 64

log = logging.getLogger("clipress.models")
State = Mapping[str, Tensor]
Which = Literal["raw", "ema"]


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint by name, and what they were taken out of."""

    state: dict[str, Tensor]
    entries: tuple[str, ...] = ()
    """Keys on the way to them, such as state_dict."""
    others: tuple[str, ...] = ()
    """Entries beside them with other weights: averaged ones, or raw ones."""
    prefix: str = ""
    """The attribute of a larger module that they were in, such as `model.`"""
    left_out: int = 0
    """Tensors of that module outside the attribute."""

    def described(self) -> str:
        """Say what was taken, such as `entry state_dict, not model_ema`; empty for bare weights."""
        parts = [f"entry {'.'.join(self.entries)}"] if self.entries else []
        parts += [f"not {', '.join(self.others)}"] if self.others else []
        parts += [f"tensors in {self.prefix}"] if self.prefix else []
        parts += [f"{self.left_out} others left out"] if self.left_out else []
        return ", ".join(parts)


def weights_from_file(path: Path, which: Which | None = None) -> Weights:
    """Return the tensors of one file; see `weights_from_files`."""
    return weights_from_files([path], which)


def weights_from_files(paths: Sequence[Path], which: Which | None = None) -> Weights:
    """Return the tensors of a checkpoint by name, without the entries and prefixes that wrap them; 16-bit floats as float32.

    Args:
        paths: what torch.save, torch.jit.save or safetensors wrote; several are the shards of one checkpoint.
        which: raw weights or their moving average (EMA); None: raw ones if there are any.

    Raises ArtifactError for a file that is missing or damaged, has no such weights, or claims impossible sizes.
    """
    weights, entries, others = dict[str, Tensor](), tuple[str, ...](), tuple[str, ...]()
    for path in paths:
        found, entries, others = _unwrapped(_read(path), which)
        weights |= _tensors_of(found)
        del found  # with what is not taken, such as an optimizer's state
    if len(weights) > MAX_TENSORS:
        raise ArtifactError(f"expected at most {MAX_TENSORS:,} tensors, found {len(weights):,} entries.")
    claimed = sum(math.prod(tensor.shape) * tensor.element_size() for tensor in weights.values())
    if claimed > MAX_BYTES:
        raise ArtifactError(
            f"expected at most {MAX_BYTES / 1e9:.0f} GB of tensors, the file claims {claimed / 1e9:,.1f} GB."
        )
    for name, tensor in weights.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ArtifactError(f"{name} claims shape {list(tensor.shape)}, and the file holds fewer bytes than that.")
    for name, tensor in weights.items():
        if tensor.is_floating_point() and tensor.element_size() < 4:  # one by one, each in place of the file's own
            weights[name] = tensor.float()
    if others and which is None:
        log.warning(
            "%s: raw weights are used (entry %s); it has averaged ones too (%s). Choose with --weights, or 'weights' in a recipe.",
            *(paths[0], ".".join(entries), ", ".join(others)),
        )
    state, prefix, left_out = without_prefixes(weights)
    return Weights(state, entries, others, prefix, left_out)


def _tensors_of(found: Any) -> dict[str, Tensor]:
    if isinstance(found, Foreign):
        found = dict(_of_module(found)) or found
    if not isinstance(found, Mapping) or not found:
        kind = found.name if isinstance(found, Foreign) else type(found).__name__
        raise ArtifactError(f"expected named weights, found {kind} without any.")
    return {str(name): _tensor(name, value) for name, value in found.items()}


def _unwrapped(content: Any, which: Which | None) -> tuple[Any, tuple[str, ...], tuple[str, ...]]:
    """Return what holds the tensors, the keys on the way to it, and keys of the other kind of weights beside it."""
    entries, others = list[str](), list[str]()
    while isinstance(content, Mapping) and len(entries) < MAX_DEPTH:
        raw, ema = ([key for key in keys if _holds_weights(content.get(key))] for keys in (RAW, EMA))
        takes_ema = bool(ema) and (which == "ema" or (which is None and not raw))
        if not (keys := ema if takes_ema else raw):
            break
        entries.append(keys[0])
        others += raw if takes_ema else ema
        content = content[keys[0]]
    if which == "ema" and not set(entries) & set(EMA):
        raise ArtifactError(
            f"expected averaged weights (an entry {', '.join(EMA)}), found none. Leave out: --weights ema"
        )
    return content, tuple(entries), tuple(others)


def _holds_weights(value: Any) -> bool:
    return isinstance(value.state if isinstance(value, Foreign) else value, Mapping)


def without_prefixes(weights: State) -> tuple[dict[str, Tensor], str, int]:
    """Return weights without what wrappers put before their names: DDP, torch.compile, and the attribute of a trainer.

    A trainer may have other tensors beside the CLIP, such as a loss's: they are left out. Also returns the prefix, and how many.
    """
    found, prefix, count = {_unwrapped_name(name): tensor for name, tensor in weights.items()}, "", len(weights)
    while "logit_scale" not in found:
        inside = [
            one for one in TRAINERS if f"{one}logit_scale" in found or all(name.startswith(one) for name in found)
        ]
        inside += [one for one in TRAINERS if not inside and any(f"{one}{two}logit_scale" in found for two in TRAINERS)]
        if not inside or not found:
            break
        own = inside[0]
        found = {_unwrapped_name(name.removeprefix(own)): one for name, one in found.items() if name.startswith(own)}
        prefix += own
    kept = {name: tensor for name, tensor in found.items() if name.rpartition(".")[2] not in LEFT_OVERS}
    return kept, prefix, count - len(found)


def _unwrapped_name(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name.replace("._orig_mod.", ".")  # compiled modules inside


def _of_module(module: Foreign, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of a pickled module, or of a TorchScript one, whose attributes are its tensors and modules."""
    own = module.state
    if depth > MAX_DEPTH or not isinstance(own, Mapping):
        return
    if "_parameters" in own:
        kinds = (own.get(kind) for kind in ("_parameters", "_buffers", "_modules"))
        own = {name: value for kind in kinds if isinstance(kind, Mapping) for name, value in kind.items()}
    for name, value in own.items():
        if isinstance(value, Tensor) or (name in NOTES and isinstance(value, int)):
            yield f"{prefix}{name}", value
        elif isinstance(value, Foreign):
            yield from _of_module(value, f"{prefix}{name}.", depth + 1)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ArtifactError("the file does not exist.")
    try:
        if path.suffix == ".safetensors":
            return read_tensors(path)
        return read_archive(path) if zipfile.is_zipfile(path) else read_legacy(path)
    except Exception as error:  # Arbitrary bytes can fail anywhere in a reader.
        raise ArtifactError(
            f"the file cannot be read ({first_line(error)}): it is truncated, damaged or no checkpoint. Copy it again."
        ) from None


def _tensor(name: object, value: Any) -> Tensor:
    if name in NOTES and isinstance(value, int):
        return torch.empty(1)
    if not isinstance(name, str) or not isinstance(value, Tensor):
        kind = f"{value.name}, which was not run" if isinstance(value, Foreign) else type(value).__name__
        raise ArtifactError(f"expected named tensors only, entry {name!r} is {kind}.")
    if value.is_nested or value.is_meta or value.is_quantized or value.layout != torch.strided:
        raise ArtifactError(f"{name} is not a plain tensor; sparse, nested, quantized and meta tensors are not read.")
    if not all(0 < side <= MAX_SIDE for side in value.shape):
        raise ArtifactError(f"{name}: expected sides of 1 to {MAX_SIDE:,}, found shape {list(value.shape)}.")
    return value.detach()
