"""A tokenizer in the files that Hugging Face's libraries read: tokenizer.json, tokenizer_config.json and
special_tokens_map.json.

CLIP's is written from its merges. Any other is the one that travels with its model, or the one that open_clip takes from
transformers, with open_clip's cleaning in front.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers

from clipress.data import packed_tokenizer
from clipress.data.bpe import WORDS, ClipBpe
from clipress.data.tokens import open_clip_tokenizer, tokenizer_from_spec
from clipress.data.vocabulary import CLIP_BPE, is_reducible, kept_tokens
from clipress.errors import ExportError
from clipress.export.layouts.hub_files import write_json
from clipress.runtime.export_folder import Exported
from clipress.runtime.served import TEXT

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"
"""CLIP's special tokens by their names on the hub. Texts were padded with id 0 in training, the token "!"."""
INSTEAD = "Use the ONNX files as they are, without --layout: clipress export RUN"
PROBES = ("a photo of a cat", "Two dogs_running,  (fast)!", "naïve café, Straße", "猫と犬", "word " * 300)
"""Texts whose ids are compared before a tokenizer is written."""
_SPACES = (normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip())
CLEANING = {
    "whitespace": _SPACES,
    "lower": (*_SPACES, normalizers.Lowercase()),
    "canonicalize": (
        normalizers.Replace("_", " "),
        normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""),
        normalizers.Lowercase(),
        *_SPACES,
    ),
}
"""What open_clip does to texts in front of a tokenizer, by its name, but for broken Unicode and HTML entities."""


def write_tokenizer(exported: Exported, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Ids are those of the exported tokenizer for ordinary texts; it also repairs broken Unicode and HTML entities first,
    which tokenizer.json cannot say. Raises ExportError for a tokenizer that these files cannot hold, ArtifactError or
    BackendMissing for one whose own files are not there.
    """
    spec = exported.tokenizer.model_dump()
    is_free = exported.graphs[TEXT].inputs[0].end is not None
    files = _clips if is_reducible(spec) else _packed if packed_tokenizer.is_packed(spec) else _transformers
    content, config, special = files(spec, is_free)
    write_json(folder / "tokenizer.json", content)
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", {"model_max_length": spec["context_length"], **config, **special})


FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids"]}
"""No attention mask: the graphs read ids alone."""
Files = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
"""tokenizer.json, what only tokenizer_config.json says, and the special tokens."""


def _transformers(spec: Mapping[str, Any], is_free: bool) -> Files:
    """Return the files of a tokenizer of transformers, after comparing ids."""
    name, kwargs = spec["name"], spec.get("kwargs") or {}
    if (strange := sorted(kwargs.keys() - {"clean", "language"})) or name == CLIP_BPE:
        raise ExportError(
            f"This layout cannot hold tokenizer '{name}' with the settings {', '.join(strange or kwargs)}. {INSTEAD}"
        )
    theirs = open_clip_tokenizer(spec).tokenizer
    backend = getattr(theirs, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(
            f"This layout needs a tokenizer.json: expected a fast tokenizer '{name}', found {type(theirs).__name__}, which "
            f"has none. {INSTEAD}"
        )
    padding = {"pad_id": theirs.pad_token_id, "pad_token": theirs.pad_token, "direction": theirs.padding_side}
    cleaning = CLEANING[kwargs.get("clean", "whitespace")]
    content = _content(spec, Tokenizer.from_str(backend.to_str()), cleaning, padding, is_free)
    special = {key: value for key, value in theirs.special_tokens_map.items() if isinstance(value, str)}
    return content, {**FAST, "padding_side": theirs.padding_side}, special


def _packed(spec: Mapping[str, Any], is_free: bool) -> Files:
    """Return the files of a tokenizer that travels with its model, after comparing ids."""
    made, clean = Tokenizer.from_str(packed_tokenizer.unpacked(spec)), (spec.get("kwargs") or {}).get("clean")
    padding = {"pad_id": spec["pad"], "pad_token": made.id_to_token(spec["pad"]), "direction": "right"}
    content = _content(spec, made, CLEANING[clean] if clean else (), padding, is_free)
    return content, {**FAST, "padding_side": "right"}, {"pad_token": padding["pad_token"]}


def _content(
    spec: Mapping[str, Any], made: Tokenizer, cleaning: Sequence[Any], padding: Mapping[str, Any], is_free: bool
) -> dict[str, Any]:
    """Return tokenizer.json with cleaning in front. Raises ExportError if its ids are not those of the exported tokenizer."""
    own, length = [] if made.normalizer is None else [made.normalizer], spec["context_length"]
    if cleaning:
        made.normalizer = normalizers.Sequence([*cleaning, *own])
    made.enable_truncation(length)
    made.enable_padding(length=length, **padding)
    for text, wanted in zip(PROBES, tokenizer_from_spec(spec)(list(PROBES)), strict=True):
        if not np.array_equal(made.encode(text).ids, wanted):
            raise ExportError(
                f"Tokenizer '{spec['name']}' gives other ids in the form of tokenizer.json, first for {text[:40]!r}, so no "
                f"layout was written. {INSTEAD}"
            )
    if is_free:
        made.enable_padding(**padding)
    return json.loads(made.to_str())


def _clips(spec: Mapping[str, Any], is_free: bool) -> Files:
    """Return the files of CLIP's own tokenizer."""
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": PAD}
    config = {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "add_prefix_space": False, "errors": "replace"}
    return _clips_content(ClipBpe(kept_tokens(spec)), spec["context_length"], is_free), config, special


def _clips_content(bpe: ClipBpe, length: int, is_free: bool) -> dict[str, Any]:
    """Return CLIP's tokenizer in the format of the library `tokenizers`."""
    names = {bpe.start: START, bpe.end: END}
    vocabulary = {names.get(number, token): number for token, number in bpe.token_ids.items()}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    words = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": True}
    spaces = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
    ends = {"sep": [END, bpe.end], "cls": [START, bpe.start], "trim_offsets": False, "add_prefix_space": False}
    padding = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": PAD}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": "BatchLongest" if is_free else {"Fixed": length}, **padding},
        "added_tokens": [{"id": number, "content": name, **special} for number, name in sorted(names.items())],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, spaces, {"type": "Lowercase"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, {**as_bytes, "use_regex": False}]},
        "post_processor": {"type": "RobertaProcessing", **ends},
        "decoder": as_bytes,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "vocab": vocabulary,
            "merges": [" ".join(pair) for pair in bpe.merges],
        },
    }
