"""The JSON files that Hugging Face's libraries read beside a model: preprocessing and the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clipress.data.bpe import WORDS, ClipBpe
from clipress.data.transforms import Preprocess
from clipress.data.vocabulary import is_reducible, kept_tokens
from clipress.errors import ExportError
from clipress.runtime.export_folder import Exported
from clipress.tasks.clip import SIDES

IMAGE, TEXT = SIDES
START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"
"""CLIP's special tokens by their names on the hub. Texts were padded with id 0 in training, the token "!"."""
RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file as the hub has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(exported: Exported, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Ids are those of the exported tokenizer for ordinary texts; it also repairs broken Unicode and HTML entities first, which
    tokenizer.json cannot say. Raises ExportError for a tokenizer that is not CLIP's.
    """
    spec = exported.tokenizer.model_dump()
    if not is_reducible(spec):
        raise ExportError(
            f"This layout needs CLIP's own tokenizer, found '{spec['name']}'. Put that tokenizer's files from the hub beside "
            "the ONNX files by hand, or choose another layout."
        )
    length = spec["context_length"]
    is_free = exported.graphs[TEXT].inputs[0].end is not None
    write_json(folder / "tokenizer.json", _tokenizer(ClipBpe(kept_tokens(spec)), length, is_free))
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": PAD}
    write_json(folder / "special_tokens_map.json", special)
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "do_lower_case": True,
        "add_prefix_space": False,
    }
    write_json(folder / "tokenizer_config.json", {**config, **special, "errors": "replace"})


def _tokenizer(bpe: ClipBpe, length: int, is_free: bool) -> dict[str, Any]:
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


def image_processor(preprocess: Preprocess) -> dict[str, Any]:
    """Return preprocessor_config.json. Raises ExportError for a way of resizing that it cannot say."""
    side = {"height": preprocess.size, "width": preprocess.size}
    if preprocess.resize_mode == "longest":
        raise ExportError(
            "This layout cannot say that images are padded (resize_mode: longest). Choose the ONNX files as they are."
        )
    crops = preprocess.resize_mode == "shortest"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": preprocess.size} if crops else side,
        "resample": RESAMPLE[preprocess.interpolation],
        "do_center_crop": crops,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
