"""Tiny CLIPs whose text towers read to the end token, and others that read the padding too."""

import numpy as np

from clipress.models.load import new_model
from clipress.models.tiny import tiny_architecture

END = 49407
TOWERS = {
    "CLIP": ({}, {}),
    "CLIP with its text tower apart": ({}, {"custom_text": True}),
    "pooled at an end token that is not the largest id": ({"pool_type": "eos", "eos_id": 2}, {}),
    "the same, apart": ({"pool_type": "eos", "eos_id": 2}, {"custom_text": True}),
    "projected by a Linear": ({"proj_bias": True}, {}),
}
WHOLE = {
    "bidirectional": {"no_causal_mask": True},
    "SigLIP": {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    "causal, pooled at the last id": {"pool_type": "last"},
    "CoCa, whose class token comes last": {"embed_cls": True},
    "pooled over all ids": {"pool_type": "none"},
}


def clip(text, changes):
    architecture = tiny_architecture() | changes
    architecture["text_cfg"] |= text
    model = new_model(architecture, 0)
    model.module.eval()
    return model


def texts(lengths, end, context=24):
    """Return ids of texts with these many, end token included."""
    ids = np.zeros((len(lengths), context), np.int64)
    for row, length in zip(ids, lengths, strict=True):
        row[: length - 1] = np.random.default_rng(length).integers(300, 40000, length - 1)
        row[length - 1] = end
    return ids
