"""BLIP's four tasks as they are published, and UPop's compressed ones: retrieval, NLVR2, captions and VQA.

The momentum copy, queues and search masks in a file are left out. Parts may be slimmed, every one to sizes of its own. The softmax scale
of the image tower stays that of 64 dims; the text modules divide by the square root of the dims that are left, as the published code
does with these files. Source: UPop (Shi et al. 2023), `models/blip*.py`.

BERT's vocabulary is in no file of weights: vocab.txt, or tokenizer.json, is read beside it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipress.data import packed_tokenizer
from clipress.data.transforms import Preprocess
from clipress.data.word_pieces import DECODE, ENCODE
from clipress.errors import ArtifactError, RecipeError
from clipress.models import blip, surgery
from clipress.models.blip import CAPTION, NLVR, RETRIEVAL, VQA
from clipress.models.importers.base import IMPORTERS, Importer
from clipress.models.importers.deit import BLOCKS, shape_of, sizes_of
from clipress.models.importers.openai import count_of, heads_of, module_from_weights, root, shape
from clipress.models.load import Model
from clipress.models.med import MERGES_FROM
from clipress.models.weights_file import State

IMAGE, ENCODER, DECODER = "visual_encoder", "text_encoder", "text_decoder"
ROOTS = {
    RETRIEVAL: {IMAGE, ENCODER, "vision_proj", "text_proj", "itm_head", "temp"},
    NLVR: {IMAGE, ENCODER, "cls_head"},
    CAPTION: {IMAGE, DECODER},
    VQA: {IMAGE, ENCODER, DECODER},
}
"""The modules of every task; a pretrained file has those of several."""
UNUSED = re.compile(
    r"(visual_encoder|text_encoder|vision_proj|text_proj)_m\..*|((image|text|idx|ptr)_queue|queue_ptr)|.*\.position_ids|.*\balpha\b.*"
)
NAMES = (
    (r"^bert\.", ""),
    (r"^embeddings\.word_embeddings\.", "words."),
    (r"^embeddings\.position_embeddings\.", "places."),
    (r"^embeddings\.LayerNorm\.", "norm."),
    (r"^encoder\.layer\.", "layers."),
    (r"\.crossattention\.self\.", ".cross.0."),
    (r"\.crossattention\.self([01])\.", r".cross.\1."),
    (r"\.crossattention\.output\.dense\.", ".cross.0.out."),
    (r"\.crossattention\.output\.dense([01])\.", r".cross.\1.out."),
    (r"\.crossattention\.output\.LayerNorm\.", ".cross_norm."),
    (r"\.crossattention\.output\.merge_layer\.", ".merge."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.out."),
    (r"\.attention\.output\.LayerNorm\.", ".attn_norm."),
    (r"\.intermediate\.dense\.", ".fc1."),
    (r"\.output\.dense\.", ".fc2."),
    (r"\.output\.LayerNorm\.", ".ffn_norm."),
    *((rf"\.{name}\.(weight|bias)$", rf".{name[0]}.\1") for name in ("key", "value")),
    (r"\.query\.", ".q."),
    (r"^cls\.predictions\.transform\.dense\.", "head.dense."),
    (r"^cls\.predictions\.transform\.LayerNorm\.", "head.norm."),
    (r"^cls\.predictions\.bias$", "head.bias"),
)
"""Published names in a text module, and ours, in the order in which they are replaced."""
TIED = {"cls.predictions.decoder.weight": "words.weight", "cls.predictions.decoder.bias": "head.bias"}
"""What a file holds twice, beside our name of the other one."""
LENGTHS = {RETRIEVAL: 35, NLVR: 64, CAPTION: 40, VQA: 35}
"""Ids of a text, as published; NLVR2's statements, of 40 words at most, and answers have no limit there."""
ANSWER = 16
PROMPT = "a picture of "  # in front of every caption


@IMPORTERS.register("blip")
class Blip(Importer):
    """Recognised by the image tower's name, beside a text module."""

    priority = 36

    def recognises(self, state: State) -> bool:
        return f"{IMAGE}.{BLOCKS}0.attn.qkv.weight" in state and any(root(n) in (ENCODER, DECODER) for n in state)

    def preprocess_source(self, folder: Path | None, model_name: str | None) -> str:
        return "BLIP's, since the file does not say"

    def model_from_state(self, state: State, model_name: str | None) -> Model:
        """Build the model, slim or dense, that computes what the published code computes from this file.

        `model_name` is a task, which a pretrained file requires; a retrieval file is also what NLVR2 starts from.
        """
        task = _task_of(state, model_name)
        others = set().union(*ROOTS.values()) - ROOTS[task]
        weights = renamed({n: t for n, t in state.items() if not (UNUSED.fullmatch(n) or root(n) in others)})
        architecture = _architecture(weights, task)
        if task == NLVR and "cls_head.0.weight" not in weights:
            weights = _with_pairs(weights, architecture["text"])
        shapes = _shapes(weights, architecture)
        tokenizer = self._tokenizer(architecture)

        def made() -> nn.Module:
            return surgery.reshape(blip.build(architecture), shapes)

        module = module_from_weights(made, weights)
        preprocess = Preprocess(size=architecture["image"]["img_size"], resize_mode="squash")
        return Model(module, architecture, preprocess, tokenizer, task=task)

    def _tokenizer(self, architecture: dict[str, Any]) -> dict[str, Any]:
        vocabulary = architecture["text"]["vocabulary"]
        packed = self.beside and packed_tokenizer.packed_from_folder(self.beside, vocabulary, 0, (DECODE, ENCODE))
        if not packed:
            raise ArtifactError(
                f"its vocabulary is not among the weights: expected {packed_tokenizer.WORDS} of bert-base-uncased beside the file, "
                "found none. Put it there."
            )
        found = {
            "name": packed_tokenizer.NAME,
            "context_length": architecture["context_length"],
            "kwargs": {},
            **packed,
            "plain": True,
        }
        return {**found, "prompt": PROMPT} if architecture["task"] == CAPTION else found


def _task_of(state: State, wanted: str | None) -> str:
    """Return the task of a file, or the wanted one of those that it serves. Raises ArtifactError or RecipeError."""
    modules = {root(name) for name in state}
    if "cls_head" in modules:
        served = [NLVR]
    elif "itm_head" in modules:
        served = [RETRIEVAL, NLVR, *([CAPTION, VQA] if DECODER in modules else [])]
    elif DECODER in modules:
        served = [VQA if ENCODER in modules else CAPTION]
    else:
        raise ArtifactError("expected a BLIP with itm_head, cls_head or text_decoder, found none of them.")
    if wanted is None and DECODER in modules and len(served) > 1:
        raise RecipeError(
            f"a pretrained BLIP, which several tasks start from: expected one of {', '.join(served)} as the model name, found "
            "none. Say which with --model."
        )
    if wanted is not None and wanted not in served:
        raise RecipeError(
            f"expected {' or '.join(served)} as the model name, found '{wanted}'. Change it or leave it out."
        )
    return wanted or served[0]


def renamed(state: State) -> dict[str, Tensor]:
    """Return weights under our names, one of every tied pair. Raises ArtifactError where a pair is not equal."""
    found: dict[str, Tensor] = {}
    tied = []
    for name, tensor in state.items():
        module, _, inside = name.partition(".")
        if module not in (ENCODER, DECODER):
            found[name] = tensor
        elif inside in TIED:
            tied.append((name, f"{module}.{TIED[inside]}", tensor))
        else:
            for theirs, ours in NAMES:
                inside = re.sub(theirs, ours, inside)
            found[f"{module}.{inside}"] = tensor
    for name, other, tensor in tied:
        if other in found and not torch.equal(found[other], tensor):
            raise ArtifactError(f"tensor {name}: expected the values that it is tied to ({other}), found others.")
    return found


def _architecture(weights: State, task: str) -> dict[str, Any]:
    """Return the sizes that follow from the shapes; heads are 64 wide."""
    at = ENCODER if task != CAPTION else DECODER
    vocabulary, width = shape(weights, f"{at}.words.weight", 2)
    positions = shape(weights, f"{at}.places.weight", 2)[0]
    text = {"vocabulary": vocabulary, "width": width, "layers": count_of(weights, f"{at}.layers.")}
    text |= {"heads": heads_of(f"{at}.words.weight", width), "positions": positions}
    found = {"task": task, "image": sizes_of(weights, f"{IMAGE}."), "text": text}
    found["context_length"] = min(LENGTHS[task], positions)
    if task == RETRIEVAL:
        found["embed_dim"] = shape(weights, "vision_proj.weight", 2)[0]
    elif task == VQA:
        found["answer_length"] = min(ANSWER, positions)
    elif task == NLVR:
        merging = (n for n in range(text["layers"]) if f"{at}.layers.{n}.merge.weight" in weights)
        found["merges_from"] = next(merging, MERGES_FROM)
    return found


def _with_pairs(weights: dict[str, Tensor], text: dict[str, int]) -> dict[str, Tensor]:
    """Return weights for pairs of images: both cross-attentions as the one in the file, merging layers and the head random."""
    found, width = dict(weights), text["width"]
    for name, tensor in weights.items():
        if ".cross.0." in name:
            found[name.replace(".cross.0.", ".cross.1.")] = tensor.clone()
    random = {f"{ENCODER}.layers.{n}.merge": (2 * width, width) for n in range(MERGES_FROM, text["layers"])}
    random |= {"cls_head.0": (width, width), "cls_head.2": (width, 2)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, sides in random.items():
            found |= {f"{name}.{kind}": tensor for kind, tensor in nn.Linear(*sides).state_dict().items()}
    return found


def _shapes(weights: State, architecture: dict[str, Any]) -> dict[str, dict[str, Any]]:
    image, text = architecture["image"], architecture["text"]
    blocks = (f"{IMAGE}.{BLOCKS}{number}" for number in range(image["depth"]))
    shapes: dict[str, dict[str, Any]] = {block: shape_of(weights, block, image["num_heads"]) for block in blocks}
    for module in sorted(ROOTS[architecture["task"]] & {ENCODER, DECODER}):
        for layer in (f"{module}.layers.{number}" for number in range(text["layers"])):
            own = _attention_shape(weights, f"{layer}.attn", text["heads"])
            shapes[layer] = own | {"ffn": shape(weights, f"{layer}.fc1.weight", 2)[0]}
            for number in range(count_of(weights, f"{layer}.cross.")):
                at = f"{layer}.cross.{number}"
                shapes[at] = _attention_shape(weights, at, text["heads"])
    return shapes


def _attention_shape(weights: State, at: str, heads: int) -> dict[str, Any]:
    rows = {part: shape(weights, f"{at}.{part}.weight", 2)[0] for part in ("q", "v")}
    for part, count in rows.items():
        if count % heads:
            raise ArtifactError(f"tensor {at}.{part}.weight: expected rows of {heads} equal heads, found {count} rows.")
    qk_dim, v_dim = rows["q"] // heads, rows["v"] // heads
    return {"heads": heads, "qk_dim": qk_dim, "v_dim": v_dim, "scale": qk_dim**-0.5}
