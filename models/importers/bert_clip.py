"""ChineseCLIPModel and AltCLIPModel of Hugging Face transformers: CLIP's image tower beside a BERT or an XLM-R encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field
from torch import Tensor

from clipress.data import packed_tokenizer
from clipress.errors import ArtifactError
from clipress.models.hf_config import CONTEXT
from clipress.models.hf_text import CLS, NORM_AND_TWO
from clipress.models.weights_file import State

HUB = {21_128: "bert-base-chinese", 250_002: "xlm-roberta-base"}
"""The tokenizer of each published vocabulary, for a folder without one."""
TEXT = "text_model."
PARTS = {
    "chinese_clip": {TEXT: "text.transformer.", "text_projection.": "text.proj."},
    "altclip": {
        f"{TEXT}roberta.": "text.transformer.",
        f"{TEXT}pre_LN.": "text.ln_final.",
        f"{TEXT}transformation.": "text.proj.0.",
        "text_projection.": "text.proj.1.",
        "vision_model.encoder.layer.": "vision_model.encoder.layers.",  # as transformers 5 writes it
    },
}
POOLER = ".pooler."  # of BERT; CLIP does not use it


class _Text(BaseModel):
    hidden_act: Literal["gelu"] = "gelu"
    max_position_embeddings: int = Field(512, ge=1)


class BertText(_Text):
    """The settings of ChineseCLIP's text tower; transformers leaves out those that have its default."""

    vocab_size: int = Field(30522, ge=1)
    hidden_size: int = Field(768, ge=1)
    intermediate_size: int = Field(3072, ge=1)
    num_hidden_layers: int = Field(12, ge=1)
    num_attention_heads: int = Field(12, ge=1)
    layer_norm_eps: float = 1e-12
    pad_token_id: int = Field(0, ge=0)
    type_vocab_size: int = Field(2, ge=1)


class XlmText(_Text):
    """The settings of AltCLIP's text tower."""

    vocab_size: int = Field(250002, ge=1)
    hidden_size: int = Field(1024, ge=1)
    intermediate_size: int = Field(4096, ge=1)
    num_hidden_layers: int = Field(24, ge=1)
    num_attention_heads: int = Field(16, ge=1)
    max_position_embeddings: int = Field(514, ge=1)
    layer_norm_eps: float = 1e-5
    pad_token_id: int = Field(1, ge=0)
    type_vocab_size: int = Field(1, ge=1)
    project_dim: int = Field(768, ge=1)


def text_config(text: BertText | XlmText, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return open_clip's config of a text tower, and the tokenizer of its folder, empty if that has none.

    Raises ArtifactError if it has none and its vocabulary is not a published one.
    """
    is_bert = isinstance(text, BertText)
    encoder = {**text.model_dump(), "model_type": "bert" if is_bert else "xlm-roberta"}
    packed = packed_tokenizer.packed_from_folder(folder, text.vocab_size, text.pad_token_id)
    tokenizer = packed_tokenizer.NAME if packed else HUB.get(text.vocab_size)
    if tokenizer is None:
        raise ArtifactError(
            f"expected a tokenizer in the folder ({packed_tokenizer.NAME} or {packed_tokenizer.WORDS}), found none."
        )
    places = text.max_position_embeddings - (0 if is_bert else text.pad_token_id + 1)
    config = {
        "context_length": min(CONTEXT, places),
        "hf_tokenizer_name": tokenizer,
        "hf_pooler_type": CLS,
        "hf_proj_type": "linear" if is_bert else NORM_AND_TWO,
        "hf_config": encoder,
    }
    return config, packed


def renamed(kind: str, state: Mapping[str, Tensor]) -> State:
    """Return the weights of the text tower in open_clip's naming; others keep their names."""
    found = {}
    for name, tensor in state.items():
        if not (name.startswith(TEXT) and POOLER in name):
            old = next((part for part in PARTS[kind] if name.startswith(part)), "")
            found[PARTS[kind].get(old, "") + name.removeprefix(old)] = tensor
    return found
