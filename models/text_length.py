"""Which text towers need no padding (data/padding.py), and CLIPs that take texts of any length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from clipress.data.padding import TextEnd
from clipress.models import anatomy
from clipress.models.attention import Attention
from clipress.models.blip import PAD
from clipress.models.hf_text import HFText


def accept_short_texts(model: nn.Module) -> nn.Module:
    """Let open_clip's models encode texts that are shorter than their context length, in place. Outputs do not change."""
    from clipress.models.short_text_clip import CLIP, ShortTextCLIP, ShortTextTransformer, TextTransformer

    if type(model) is CLIP:
        model.__class__ = ShortTextCLIP
    text = getattr(model, "text", None)
    if type(text) is TextTransformer:
        text.__class__ = ShortTextTransformer
    return model


class Reader(Protocol):
    """What is required of a model. A `Model` has these attributes."""

    module: nn.Module
    tokenizer: dict[str, Any] | None


def text_end(model: nn.Module) -> TextEnd | None:
    """Return where a model's text tower reads to; None for one that reads all ids, padding included."""
    if anatomy.is_blip(model):
        return TextEnd(pad=PAD)
    if not anatomy.is_clip(model):
        return None
    _, text = anatomy.text_root(model)
    if isinstance(text, HFText):
        return TextEnd(pad=text.shape.pad)
    blocks = getattr(getattr(text, "transformer", None), "resblocks", ())
    is_causal = getattr(text, "attn_mask", None) is not None and getattr(text, "cls_emb", None) is None
    if not is_causal or not blocks or not all(isinstance(block.attn, Attention) for block in blocks):
        return None
    pool = getattr(text, "pool_type", getattr(text, "text_pool_type", None))
    ends = {"argmax": TextEnd(), "eos": TextEnd(getattr(text, "eos_id", getattr(text, "text_eos_id", None)))}
    return ends.get(pool)


def text_ends(model: Reader, teachers: Sequence[Reader] = ()) -> list[TextEnd | None]:
    """Return where all models that get a model's token ids read to: itself and its teachers."""
    ends = [text_end(one.module) for one in (model, *teachers)]
    # A teacher with a larger vocabulary has another id for the end token; the largest id is the same token in both.
    return [
        end if end in (None, TextEnd()) or one.tokenizer == model.tokenizer else None
        for one, end in zip((model, *teachers), ends, strict=True)
    ]
