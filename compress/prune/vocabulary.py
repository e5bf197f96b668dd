"""Shrink the token embedding, most of a small CLIP's parameters: remove tokens that no text uses, factorise the table.

    vocabulary: {}                                     keeps the tokens of the training data's captions and class prompts
    vocabulary: {corpus: [captions.txt], data: true}   and those of text files, one text per line
    vocabulary: {factorize: {params: 0.3}}             two factors with 30 % of the table's parameters; all tokens stay

Texts made of the corpus' words get the same pieces and the same embeddings as before; other words fall into smaller
pieces. Factors are the principal components of the table, its rows weighted by how often their tokens occur.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, PlainSerializer

from clipress.compress.context import Context
from clipress.data.bpe import SIZE, needed_tokens
from clipress.data.formats.files import lines_of
from clipress.data.sources import readable_captions
from clipress.data.tokens import count_tokens
from clipress.data.vocabulary import is_reducible, kept_tokens, reduced
from clipress.errors import RecipeError
from clipress.models import anatomy, token_table
from clipress.models.load import Model
from clipress.recipe import Section
from clipress.storage import sha256


def _with_hash(path: Path) -> str:
    """Name a file together with its content, on which the stage's result depends."""
    return f"{path} ({sha256(path)[:12]})" if path.is_file() else str(path)


class Factorize(Section):
    """The rank of a factorised token embedding: exactly one of rank, energy, params."""

    rank: int | None = Field(None, ge=1)
    energy: float | None = Field(None, gt=0, lt=1)
    """Fraction of the table's squared norm to keep; every row counts as often as its token occurs."""
    params: float | None = Field(None, gt=0, lt=1)
    """Fraction of the table's parameters."""

    def model_post_init(self, _: Any) -> None:
        given = list(self.model_dump(exclude_none=True))
        if len(given) != 1:
            raise RecipeError(
                "prune.vocabulary.factorize: expected exactly one of rank, energy, params; "
                f"found {', '.join(given) or 'none'}."
            )

    def rank_of(self, energies: np.ndarray, tokens: int) -> int:
        """Return the rank for a table of `tokens` rows with these energies. Raises RecipeError if it saves nothing."""
        width = len(energies)
        if self.params is not None:
            rank = int(self.params * tokens * width / (tokens + width))
        elif self.energy is not None:
            rank = int(np.searchsorted(np.cumsum(energies), self.energy * energies.sum())) + 1
        else:
            rank = self.rank
        most = (tokens * width - 1) // (tokens + width)
        if not 1 <= rank <= most:
            raise RecipeError(
                f"prune.vocabulary.factorize: expected a rank from 1 to {most}, beyond which two factors are no smaller than "
                f"the table of {tokens:,} x {width}; found {rank}. Change {next(iter(self.model_dump(exclude_none=True)))}."
            )
        return rank


class Vocabulary(Section):
    """Settings of `prune.vocabulary`."""

    corpus: tuple[Annotated[Path, PlainSerializer(_with_hash, when_used="json")], ...] = ()
    """Text files, one text per line, whose tokens are kept."""
    data: bool | None = None
    """Keep the tokens of the training data's captions and class prompts. Default: true unless `corpus` or `factorize` is set."""
    min_count: int = Field(1, ge=1)
    """Remove tokens that occur less often than this, although texts with them then fall into smaller pieces."""
    factorize: Factorize | None = None

    @property
    def reads_data(self) -> bool:
        return not self.corpus and self.factorize is None if self.data is None else self.data

    @property
    def removes_tokens(self) -> bool:
        return bool(self.corpus) or self.reads_data

    def model_post_init(self, _: Any) -> None:
        if not self.removes_tokens and (self.factorize is None or self.min_count > 1):
            raise RecipeError(
                "prune.vocabulary: expected texts whose tokens are kept, found none. Set corpus, or data: true."
            )


def shrink(settings: Vocabulary, model: Model, context: Context) -> tuple[Model, dict[str, Any]]:
    """Remove tokens, then factorise the table, whichever is set. Returns the model, and details for the lineage."""
    table = anatomy.token_table(model.module)
    if table is None:
        raise RecipeError("prune.vocabulary: the model has no token embedding. Remove 'vocabulary'.")
    before = _embedding_parameters(model)
    counts = count_tokens(model.tokenizer, _texts(settings, context))
    if settings.removes_tokens:
        model, counts = _remove_tokens(model, counts, settings.min_count)
    details: dict[str, Any] = {"tokens": len(table.weight)}
    if settings.factorize is not None:
        details |= _factorize(settings.factorize, model, counts)
    details["embedding_params_kept"] = round(_embedding_parameters(model) / before, 6)
    shown = ", ".join(f"{key} {value:,}" for key, value in details.items())
    context.say(f"{context.title}: vocabulary: {shown}")
    return model, {"vocabulary": details}


def _embedding_parameters(model: Model) -> int:
    _, text = anatomy.text_root(model.module)
    return sum(parameter.numel() for parameter in text.token_embedding.parameters())


def _texts(settings: Vocabulary, context: Context) -> Iterator[str]:
    """Yield the texts of the corpus and of the training data. Captions that cannot be read are left out."""
    for path in settings.corpus:
        if not path.is_file():
            raise RecipeError(f"prune.vocabulary.corpus: expected a text file, found none at {path}.")
        yield from (line for _, line in lines_of(path))
    # Without a corpus the data only weigh the rows.
    for source in context.sources() if settings.reads_data or not settings.corpus else ():
        if classes := getattr(source, "classes", None):
            for label in range(len(classes.names)):
                yield from classes.prompts(label)
            continue
        for item in range(len(source)) if source.has_texts else ():
            yield from readable_captions(source, item)


def _remove_tokens(model: Model, counts: Counter[int], min_count: int) -> tuple[Model, Counter[int]]:
    """Return the model with a smaller table and tokenizer, and the counts by its ids."""
    table, spec = anatomy.token_table(model.module), model.tokenizer
    own = kept_tokens(spec) or list(range(SIZE))
    if not is_reducible(spec) or len(table.weight) < len(own):
        raise RecipeError(
            f"prune.vocabulary: expected CLIP's own tokenizer without settings and {len(own):,} rows or more, found "
            f"'{spec['name']}' with {spec.get('kwargs') or 'no settings'} and {len(table.weight):,} rows. Set only 'factorize'."
        )
    kept = needed_tokens({own[token]: count for token, count in counts.items()}, min_count)
    rows = np.searchsorted(own, kept)
    token_table.keep_rows(model.module, rows)
    architecture = copy.deepcopy(model.architecture)
    text = architecture["text_cfg"]
    text["vocab_size"] = len(kept)
    places = {int(row): place for place, row in enumerate(rows)}
    for key in {"pad_id", "eos_id"} & text.keys():
        text[key] = places.get(text[key], text[key])
    new = Counter({places[token]: count for token, count in counts.items() if token in places})
    return replace(model, architecture=architecture, tokenizer=reduced(spec, kept)), new


def _factorize(settings: Factorize, model: Model, counts: Counter[int]) -> dict[str, Any]:
    """Replace the table by two factors, in place. Tokens that do not occur count once."""
    tokens = len(anatomy.token_table(model.module).weight)
    weights = torch.ones(tokens)
    for token, count in counts.items():
        weights[token] += count
    energies, directions = token_table.components(model.module, weights)
    energies = energies.cpu().numpy()
    rank = settings.rank_of(energies, tokens)
    token_table.factorize(model.module, directions[:, :rank])
    return {"rank": rank, "energy_kept": round(float(energies[:rank].sum() / energies.sum()), 6)}
