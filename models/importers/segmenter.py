"""Segmenter: an encoder of timm's names and a decoder of masks, as it is published, and UPop's compressed ones.

Their blocks are a DeiT's (deit.py). The classifier that the encoder was pretrained with lies in the files too, unused; it is left out.
What `variant.yml` beside a file says follows from the shapes.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from clipress.data.transforms import Preprocess
from clipress.models import segmenter, surgery
from clipress.models.importers.base import IMPORTERS, Importer
from clipress.models.importers.deit import BLOCKS, MASK, labels_for, shape_of, sizes_of
from clipress.models.importers.openai import count_of, module_from_weights, refuse_name, shape
from clipress.models.load import Model
from clipress.models.weights_file import State

ENCODER, DECODER = "encoder.", "decoder."
UNUSED = f"{ENCODER}head."


@IMPORTERS.register("segmenter")
class Segmenter(Importer):
    """Recognised by the decoder's class embeddings."""

    priority = 35

    def recognises(self, state: State) -> bool:
        return f"{DECODER}cls_emb" in state and f"{ENCODER}{BLOCKS}0.attn.qkv.weight" in state

    def preprocess_source(self, folder: Path | None, model_name: str | None) -> str:
        return "Segmenter's, since the file does not say"

    def model_from_state(self, state: State, model_name: str | None) -> Model:
        """Build the Segmenter, slim or dense, that computes what the published code computes from this file."""
        refuse_name(model_name)
        weights = {name: t for name, t in state.items() if not (MASK.search(name) or name.startswith(UNUSED))}
        sizes, layers = sizes_of(weights, ENCODER), count_of(weights, f"{DECODER}{BLOCKS}")
        labels = labels_for(shape(weights, f"{DECODER}cls_emb", 3)[1], "ade20k")
        architecture = {"sizes": sizes, "labels": labels, segmenter.DECODER: layers}
        counts = {ENCODER: sizes["depth"], DECODER: layers}
        blocks = [f"{side}{BLOCKS}{number}" for side, count in counts.items() for number in range(count)]
        shapes = {block: shape_of(weights, block, sizes["num_heads"]) for block in blocks}

        def made() -> nn.Module:
            return surgery.reshape(segmenter.build(architecture), shapes)

        module = module_from_weights(made, weights)
        return Model(
            module, architecture, Preprocess(size=sizes["img_size"], **segmenter.PREPROCESS), None, task="segmentation"
        )
