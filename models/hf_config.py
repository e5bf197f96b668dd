"""What is known of the text encoders that open_clip takes from transformers: their configs, and the names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clipress.errors import ArtifactError

CONTEXT = 77  # ids of a text, where the config does not say: open_clip's default, far below what these encoders accept

_ROBERTA = {
    "model_type": "roberta",
    "vocab_size": 50265,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 514,
    "layer_norm_eps": 1e-05,
    "pad_token_id": 1,
}
_XLM = {**_ROBERTA, "model_type": "xlm-roberta", "vocab_size": 250002}
_XLM_LARGE = {
    **_XLM,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_MT5 = {
    "model_type": "mt5",
    "vocab_size": 250112,
    "d_model": 768,
    "num_layers": 12,
    "num_heads": 12,
    "d_kv": 64,
    "d_ff": 2048,
    "layer_norm_epsilon": 1e-06,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "pad_token_id": 0,
}
_NLLB = {
    "model_type": "m2m_100",
    "vocab_size": 256206,
    "d_model": 1024,
    "encoder_layers": 12,
    "encoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "max_position_embeddings": 1024,
    "scale_embedding": True,
    "pad_token_id": 1,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "roberta-base": _ROBERTA,
    "xlm-roberta-base": _XLM,
    "xlm-roberta-large": _XLM_LARGE,
    "google/mt5-base": _MT5,
    "google/mt5-xl": {**_MT5, "d_model": 2048, "num_layers": 24, "num_heads": 32, "d_ff": 5120},
    "facebook/nllb-200-distilled-600M": _NLLB,
    "facebook/nllb-200-distilled-1.3B": {**_NLLB, "encoder_layers": 24, "encoder_ffn_dim": 8192},
}
"""The published config of each encoder on the hub, as far as its shapes and what it computes depend on it."""

_KEYS = {
    "roberta": ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps"),
    "mt5": ("d_model", "num_layers", "num_heads", "d_ff", "layer_norm_epsilon"),
    "m2m_100": ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", None),
}
_KEYS |= dict.fromkeys(("bert", "xlm-roberta"), _KEYS["roberta"])
ACTIVATIONS = {"bert": "gelu", "roberta": "gelu", "xlm-roberta": "gelu", "mt5": "gated-gelu", "m2m_100": "relu"}

# Our names in the text tower, and transformers'.
_PARTS = (("q", "query"), ("k", "key"), ("v", "value"))
_NAMES: dict[str, list[tuple[str, str]]] = {
    "roberta": [
        ("token_embedding", "transformer.embeddings.word_embeddings"),
        ("positions", "transformer.embeddings.position_embeddings"),
        ("token_type", "transformer.embeddings.token_type_embeddings"),
        ("ln_pre", "transformer.embeddings.LayerNorm"),
        *(
            (f"transformer.resblocks.#.attn.{ours}", f"transformer.encoder.layer.#.attention.self.{it}")
            for ours, it in _PARTS
        ),
        ("transformer.resblocks.#.attn.out", "transformer.encoder.layer.#.attention.output.dense"),
        ("transformer.resblocks.#.ln_1", "transformer.encoder.layer.#.attention.output.LayerNorm"),
        ("transformer.resblocks.#.mlp.c_fc", "transformer.encoder.layer.#.intermediate.dense"),
        ("transformer.resblocks.#.mlp.c_proj", "transformer.encoder.layer.#.output.dense"),
        ("transformer.resblocks.#.ln_2", "transformer.encoder.layer.#.output.LayerNorm"),
    ],
    "mt5": [
        ("token_embedding", "transformer.embed_tokens"),
        ("relative_bias", "transformer.block.0.layer.0.SelfAttention.relative_attention_bias"),
        *(
            (f"transformer.resblocks.#.attn.{ours}", f"transformer.block.#.layer.0.SelfAttention.{it}")
            for ours, it in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))
        ),
        ("transformer.resblocks.#.ln_1", "transformer.block.#.layer.0.layer_norm"),
        ("transformer.resblocks.#.mlp.c_gate", "transformer.block.#.layer.1.DenseReluDense.wi_0"),
        ("transformer.resblocks.#.mlp.c_fc", "transformer.block.#.layer.1.DenseReluDense.wi_1"),
        ("transformer.resblocks.#.mlp.c_proj", "transformer.block.#.layer.1.DenseReluDense.wo"),
        ("transformer.resblocks.#.ln_2", "transformer.block.#.layer.1.layer_norm"),
        ("ln_final", "transformer.final_layer_norm"),
    ],
    "m2m_100": [
        ("token_embedding", "transformer.embed_tokens"),
        *(
            (f"transformer.resblocks.#.attn.{ours}", f"transformer.layers.#.self_attn.{ours}_proj")
            for ours, _ in _PARTS
        ),
        ("transformer.resblocks.#.attn.out", "transformer.layers.#.self_attn.out_proj"),
        ("transformer.resblocks.#.ln_1", "transformer.layers.#.self_attn_layer_norm"),
        ("transformer.resblocks.#.mlp.c_fc", "transformer.layers.#.fc1"),
        ("transformer.resblocks.#.mlp.c_proj", "transformer.layers.#.fc2"),
        ("transformer.resblocks.#.ln_2", "transformer.layers.#.final_layer_norm"),
        ("ln_final", "transformer.layer_norm"),
    ],
}
_NAMES |= dict.fromkeys(("bert", "xlm-roberta"), _NAMES["roberta"])


def with_config(text_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `text_cfg` with the config of the encoder that it names on the hub, the published one unless it has one.

    Raises ArtifactError for an encoder that clipress does not know.
    """
    name = text_cfg["hf_model_name"]
    config = text_cfg.get("hf_config") or PUBLISHED.get(name)
    if config is None:
        raise ArtifactError(
            f"its text tower comes from the hub's '{name}', whose config is not known. Known are {', '.join(PUBLISHED)}."
        )
    return {**text_cfg, "hf_config": dict(config), "context_length": int(text_cfg.get("context_length", CONTEXT))}


@dataclass(frozen=True)
class Shape:
    """What an encoder's config says."""

    kind: str
    vocab: int
    width: int
    layers: int
    heads: int
    head_dim: int
    hidden: int
    eps: float
    pad: int


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Read an encoder's config. Raises ArtifactError for another kind of encoder, or keys that are missing or impossible."""
    kind = config.get("model_type")
    if kind not in _KEYS:
        raise ArtifactError(f"its text tower: expected one of {', '.join(_KEYS)}, found model_type {kind!r:.50}.")
    names = _KEYS[kind]
    try:
        width, layers, heads, hidden = (int(config[name]) for name in names[:4])
        eps, pad, vocab = float(config.get(names[4], 1e-5)), int(config["pad_token_id"]), int(config["vocab_size"])
        head_dim = int(config["d_kv"]) if kind == "mt5" else width // heads
        activation = config.get("hidden_act", config.get("activation_function", config.get("feed_forward_proj")))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ArtifactError(f"its text tower's config, of model_type {kind}, is not usable: {error!r:.100}.") from None
    if min(width, layers, heads, hidden, head_dim, vocab - pad) < 1 or (kind != "mt5" and width % heads):
        raise ArtifactError(f"its text tower's config makes no sense: {heads} heads, width {width}, {layers} layers.")
    if activation not in (None, ACTIVATIONS[kind]):
        raise ArtifactError(f"its text tower: expected the activation {ACTIVATIONS[kind]}, found {activation!r:.50}.")
    return Shape(kind, vocab, width, layers, heads, head_dim, hidden, eps, pad)


def stock_name(kind: str, name: str) -> str:
    """Return transformers' name of one of our tensors of a text tower, both without the prefix of the tower."""
    return _renamed(name, _NAMES[kind])


def own_name(kind: str, name: str) -> str:
    """Return our name of one of transformers' tensors of a text tower."""
    return _renamed(name, [(theirs, ours) for ours, theirs in _NAMES[kind]])


def _renamed(name: str, pairs: list[tuple[str, str]]) -> str:
    for old, new in pairs:
        if found := re.fullmatch(re.escape(old).replace(r"\#", r"(\d+)") + r"\.(weight|bias)", name):
            return new.replace("#", found[1]) + "." + found[found.lastindex]
    return name
