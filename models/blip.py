"""BLIP (Li et al. 2022) for four tasks: retrieval, reasoning about two images (NLVR2), captions and answers (VQA).

    image   pixels [B, 3, S, S] -> states [B, N, V], all tokens of a ViT
    text    ids [B, L] and states -> the text module (med.py) -> a head

Texts come as `[CLS] ... [SEP]` with a mask of their tokens. The first token becomes `[ENC]` where a text is read beside an image, and
`[DEC]` where one is written; these are the last two of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipress.errors import ArtifactError
from clipress.models import surgery, vit
from clipress.models.med import DROPOUT, Med, Sizes, Writer
from clipress.models.owners import owned

RETRIEVAL, NLVR, CAPTION, VQA = "retrieval", "nlvr", "caption", "vqa"
VIT_EPS = 1e-6
PAD = 0  # the id of padding, in BERT's vocabulary and every other
DECODE, ENCODE = -2, -1  # places of [DEC] and [ENC] in the vocabulary
TEMPERATURE = 0.07
SMOOTHING = 0.1
"""Label smoothing of answers and captions, in training and where answers are ranked."""


class Blip(nn.Module):
    """What the four share: an image tower and the two marks of texts."""

    def __init__(self, image: nn.Module, text: Sizes) -> None:
        super().__init__()
        self.visual_encoder, self.vocabulary = image, text.vocabulary

    def image(self, pixels: Tensor) -> Tensor:
        """Return the states of images [B, 3, S, S], after the final norm: [B, N, V]."""
        return self.visual_encoder.forward_features(pixels)

    def no_weight_decay(self) -> set[str]:
        """Return the last parts of the names of what does not decay, as timm's models do."""
        return {"pos_embed", "cls_token"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the image tower's activations in the backward pass, or keep them."""
        self.visual_encoder.blocks.recompute = enable

    def _marked(self, ids: Tensor, mark: int) -> Tensor:
        return torch.cat([torch.full_like(ids[:, :1], self.vocabulary + mark), ids[:, 1:]], 1)


class Retrieval(Blip):
    """Embeddings of images and texts, and a score of whether a pair belongs together."""

    def __init__(self, image: nn.Module, text: Sizes, embed_dim: int, dropout: float) -> None:
        super().__init__(image, text)
        self.text_encoder = Med(text, (image.embed_dim,), dropout=dropout)
        self.vision_proj, self.text_proj = (nn.Linear(n, embed_dim) for n in (image.embed_dim, text.width))
        self.itm_head, self.temp = nn.Linear(text.width, 2), nn.Parameter(torch.tensor(TEMPERATURE))

    def image_features(self, states: Tensor) -> Tensor:
        """Return embeddings [B, D] of images by their states, of any length."""
        return self.vision_proj(states[:, 0])

    def text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return embeddings [B, D] of texts, of any length."""
        return self.text_proj(self.text_encoder(ids, mask)[:, 0])

    def image_embeds(self, states: Tensor) -> Tensor:
        """Return unit embeddings [B, D] of images by their states."""
        return F.normalize(self.image_features(states), dim=-1)

    def text_embeds(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return unit embeddings [B, D] of texts."""
        return F.normalize(self.text_features(ids, mask), dim=-1)

    def match(self, ids: Tensor, mask: Tensor, states: Tensor) -> Tensor:
        """Return logits [B, 2] of texts and the states of images; class 1: they belong together."""
        return self.itm_head(self.text_encoder(self._marked(ids, ENCODE), mask, (states,))[:, 0])

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return embeddings of images and texts, and the logits of every image with its text."""
        states = self.image(pixels)
        return self.image_embeds(states), self.text_embeds(ids, mask), self.match(ids, mask, states)


class Nlvr(Blip):
    """Whether a statement about two images is true."""

    def __init__(self, image: nn.Module, text: Sizes, merges_from: int, dropout: float) -> None:
        super().__init__(image, text)
        self.text_encoder = Med(text, (image.embed_dim,) * 2, merges_from, dropout)
        self.cls_head = nn.Sequential(nn.Linear(text.width, text.width), nn.ReLU(), nn.Linear(text.width, 2))

    def reason(self, ids: Tensor, mask: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Return logits [B, 2] of statements and the states of both images; class 1: true."""
        return self.cls_head(self.text_encoder(self._marked(ids, ENCODE), mask, (first, second))[:, 0])

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return logits [B, 2]; pixels [2B, 3, S, S] are all first images, then all second ones."""
        samples = len(ids)
        with owned(torch.arange(samples, device=ids.device).repeat(2), samples):
            first, second = self.image(pixels).chunk(2)
        return self.reason(ids, mask, first, second)


class Caption(Blip):
    """Text written to an image."""

    def __init__(self, image: nn.Module, text: Sizes, dropout: float) -> None:
        super().__init__(image, text)
        self.text_decoder = Writer(text, (image.embed_dim,), dropout)

    def memory(self, states: Tensor) -> Tensor:
        """Return what every step of writing to an image shares, [B, N, D]: its keys and values in all layers."""
        return self.text_decoder.keys(states)

    def decode(self, ids: Tensor, mask: Tensor | None, memory: Tensor, last: bool = False) -> Tensor:
        """Return logits of the word behind every token [B, L, vocabulary], or with `last` behind the last one [B, 1, ...]."""
        return self.text_decoder.write(self._marked(ids, DECODE), mask, None, keys=memory, last=last)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return logits [B, L, vocabulary] of the words behind every token of a caption."""
        return self.text_decoder.write(self._marked(ids, DECODE), mask, self.image(pixels))


class Vqa(Blip):
    """Answers to questions about an image."""

    def __init__(self, image: nn.Module, text: Sizes, dropout: float) -> None:
        super().__init__(image, text)
        self.text_encoder = Med(text, (image.embed_dim,), dropout=dropout)
        self.text_decoder = Writer(text, (text.width,), dropout)

    def question(self, ids: Tensor, mask: Tensor, states: Tensor) -> Tensor:
        """Return the states [B, L, W] of questions read beside the states of images."""
        return self.text_encoder(self._marked(ids, ENCODE), mask, (states,))

    def decode(
        self, ids: Tensor, mask: Tensor | None, states: Tensor, states_mask: Tensor, last: bool = False
    ) -> Tensor:
        """Return logits of the word behind every token of an answer, by its question's states; `last` as for captions."""
        return self.text_decoder.write(self._marked(ids, DECODE), mask, states, states_mask, last=last)

    def answer(self, ids: Tensor, mask: Tensor, states: Tensor, states_mask: Tensor) -> Tensor:
        """Return log-probabilities [B, L - 1] of every token of an answer but the first, smoothed as in training; padding has 0."""
        return token_likelihoods(self.decode(ids, mask, states, states_mask), ids, mask, SMOOTHING)

    def forward(
        self, pixels: Tensor, ids: Tensor, mask: Tensor, answers: Tensor, answers_mask: Tensor, owners: Tensor
    ) -> Tensor:
        """Return logits [A, L, vocabulary] of answers; `owners` [A] says whose question each one answers."""
        states = self.question(ids, mask, self.image(pixels))
        with owned(owners, len(ids)):
            return self.decode(answers, answers_mask, states[owners], mask[owners])


def token_likelihoods(logits: Tensor, ids: Tensor, mask: Tensor, smoothing: float) -> Tensor:
    """Return log-probabilities [B, L - 1] of the tokens behind the first, by logits [B, L, vocabulary]; 0 at padding.

    With smoothing s they are (1 - s) log p(token) + s (the mean of log p over the vocabulary).
    """
    scores = logits[:, :-1].float().log_softmax(-1)
    own = scores.gather(-1, ids[:, 1:, None])[..., 0]
    return ((1 - smoothing) * own + smoothing * scores.mean(-1)) * mask[:, 1:]


TEXT_SIZES = {"vocabulary": 1 << 22, "width": 1 << 14, "layers": 1 << 8, "heads": 1 << 10, "positions": 1 << 13}
MORE = {
    RETRIEVAL: {"embed_dim": 1 << 14},
    NLVR: {"merges_from": 1 << 8},
    CAPTION: {},
    VQA: {"answer_length": 1 << 13},
}
"""What an architecture says beside the sizes of its towers, by task, with upper bounds; all have a `context_length` too."""


def build(architecture: Mapping[str, Any], seed: int | None = None) -> nn.Module:
    """Build a BLIP with random weights and our attention. Raises ArtifactError or RecipeError.

    An architecture has `task`, `image` (the sizes of a ViT, in timm's words), `text` (med.Sizes) and `context_length`, the tokens of a
    text; `embed_dim` for retrieval, `merges_from` for nlvr (see Med), for vqa `answer_length`, and `dropout` if it is not BLIP's.
    """
    task, sizes, text = _checked(architecture)
    dropout = architecture.get("dropout", DROPOUT)
    with vit.seeded(seed):
        image = vit.bare(sizes, VIT_EPS)
        if task == RETRIEVAL:
            model = Retrieval(image, text, architecture["embed_dim"], dropout)
        elif task == NLVR:
            model = Nlvr(image, text, architecture["merges_from"], dropout)
        else:
            model = (Caption if task == CAPTION else Vqa)(image, text, dropout)
    model.context_length, model.answer_length = architecture["context_length"], architecture.get("answer_length")
    return surgery.use_own_attention(model)


def _checked(architecture: Mapping[str, Any]) -> tuple[str, dict[str, int], Sizes]:
    """Validate an architecture that anyone may have written. Returns the task, and the sizes of image and text tower."""
    task, image, text = (architecture.get(key) for key in ("task", "image", "text"))
    if task not in MORE:
        raise ArtifactError(f"architecture.task: expected one of {', '.join(MORE)}, found {task!r:.40}.")
    for name, sizes, known in (("image", image, vit.SIZES), ("text", text, TEXT_SIZES)):
        if not isinstance(sizes, dict) or sizes.keys() != known.keys():
            raise ArtifactError(f"architecture.{name}: expected {', '.join(known)}, found {sizes!r:.200}.")
        _check_sizes(f"architecture.{name}", sizes, known)
    lengths = {key: text["positions"] for key in ("context_length", *(("answer_length",) if task == VQA else ()))}
    _check_sizes("architecture", architecture, MORE[task] | lengths)
    dropout = architecture.get("dropout", DROPOUT)
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ArtifactError(f"architecture.dropout: expected 0 to less than 1, found {dropout!r:.40}.")
    if text["width"] % text["heads"] or text["vocabulary"] < 2:
        raise ArtifactError(
            f"architecture.text: expected a width of equal heads and a vocabulary of at least 2, found {text!r:.200}."
        )
    return task, image, Sizes(**text)


def _check_sizes(where: str, found: Mapping[str, Any], bounds: Mapping[str, int]) -> None:
    for key, most in bounds.items():
        vit.check_size(f"{where}.{key}", found.get(key), most, least=0 if key == "merges_from" else 1)
