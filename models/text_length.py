"""Texts without the ids that cannot matter: a causal text tower that pools at the end token reads nothing after it.

Every text is padded to the context length, 77 ids for most CLIPs, while a caption has 10 to 20. Cut at the longest text of a
batch, such a tower computes the same from a fraction of the work. Bidirectional towers, and those that pool over all ids or at
the last one, read the padding too: their texts stay whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import nn

from clipress.models import anatomy
from clipress.models.attention import Attention

LENGTHS = (8, 16, 24, 32, 48, 64)  # few, so that what is compiled or allocated for a shape is used again


def accept_short_texts(model: nn.Module) -> nn.Module:
    """Let open_clip's CLIP encode texts that are shorter than its context length, in place. Outputs do not change."""
    from open_clip.model import CLIP

    if type(model) is CLIP:
        from clipress.models.short_text_clip import ShortTextCLIP

        model.__class__ = ShortTextCLIP
    return model


class Reader(Protocol):
    """What is asked of a model. A `Model` has these attributes."""

    module: nn.Module
    tokenizer: dict[str, Any] | None


@dataclass(frozen=True)
class TextEnd:
    """Where a text tower reads to: the first of the largest ids, as OpenAI's CLIP pools, or the first end token."""

    eos: int | None = None
    """Id of the end token; None: the largest id of a text."""

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        """Return how many ids of each text [N, L] are read: int64 [N]."""
        return (ids if self.eos is None else ids == self.eos).argmax(1) + 1


def text_end(model: nn.Module) -> TextEnd | None:
    """Return where a model's text tower reads to; None for one that reads all ids, padding included."""
    if not anatomy.is_clip(model):
        return None
    _, text = anatomy.text_root(model)
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
        end if end is None or end.eos is None or one.tokenizer == model.tokenizer else None
        for one, end in zip((model, *teachers), ends, strict=True)
    ]


def without_padding(ids: np.ndarray, ends: Sequence[TextEnd | None]) -> np.ndarray:
    """Cut token ids [N, L] after the last one that a tower reads, rounded up to one of LENGTHS; `ends` are the towers'."""
    if not len(ids) or None in ends:
        return ids
    longest = max(int(end.lengths(ids).max()) for end in ends)
    return ids[:, : next((length for length in LENGTHS if length >= longest), ids.shape[1])]
