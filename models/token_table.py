"""A text tower's token embedding made smaller: fewer rows, or two factors instead of one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clipress.errors import ArtifactError
from clipress.models.anatomy import text_root, token_table


class FactorizedEmbedding(nn.Module):
    """A token embedding of low rank: ids [B, L] -> rows [B, L, r] -> up [B, L, W]."""

    def __init__(self, tokens: int, rank: int, width: int) -> None:
        super().__init__()
        self.rows = nn.utils.skip_init(nn.Embedding, tokens, rank)
        self.up = nn.utils.skip_init(nn.Linear, rank, width, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up the rows of ids and map them to the tower's width."""
        return self.up(self.rows(ids))


@torch.no_grad()
def keep_rows(model: nn.Module, kept: Sequence[int]) -> None:
    """Keep only these rows of the token embedding, in place and in this order; ids that the tower reads follow them."""
    table, (_, text) = token_table(model), text_root(model)
    rows = table.weight[torch.as_tensor(kept, device=table.weight.device)]
    table.weight = nn.Parameter(rows.clone(), requires_grad=table.weight.requires_grad)
    table.num_embeddings = model.vocab_size = text.vocab_size = len(kept)
    places = {int(row): place for place, row in enumerate(kept)}
    for module, name in ((model, "text_eos_id"), (text, "eos_id"), (text, "pad_id")):
        if hasattr(module, name):
            setattr(module, name, places.get(getattr(module, name), getattr(module, name)))


@torch.no_grad()
def components(model: nn.Module, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the energies [W], largest first, and directions [W, W] (columns) of the token embedding, in double precision.

    `weights` [V] say how much each row counts. The first r directions span the subspace with the least squared error.
    """
    table = _whole_table(model).double()
    energies, directions = torch.linalg.eigh(table.T @ (weights.to(table)[:, None] * table))
    return energies.flip(0).clamp_min(0), directions.flip(1)


@torch.no_grad()
def factorize(model: nn.Module, directions: Tensor) -> None:
    """Replace the token embedding by its projection on directions [W, r], orthonormal columns, as two factors, in place."""
    table, (_, text) = _whole_table(model), text_root(model)
    small = FactorizedEmbedding(len(table), directions.shape[1], table.shape[1]).to(table)
    small.rows.weight.copy_(table.double() @ directions)
    small.up.weight.copy_(directions)
    text.token_embedding = small.requires_grad_(token_table(model).weight.requires_grad).train(text.training)


def _whole_table(model: nn.Module) -> Tensor:
    """Return the token embedding as one table [V, W], factorised or not."""
    table = token_table(model).weight
    return text_root(model)[1].token_embedding(torch.arange(len(table), device=table.device))


def path_of(model: nn.Module) -> str:
    """Return the module path of the token embedding, under which its shape is recorded."""
    return f"{text_root(model)[0]}token_embedding"


def table_shape(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the record of a factorised token embedding for a model's shapes; nothing for a plain one."""
    embedding = getattr(text_root(model)[1], "token_embedding", None)
    factorized = isinstance(embedding, FactorizedEmbedding)
    return {path_of(model): {"rank": embedding.rows.embedding_dim}} if factorized else {}


def reshape_table(model: nn.Module, record: Any) -> None:
    """Give the token embedding the rank of a record, in place; the weights must be loaded afterwards.

    Raises ArtifactError for a rank that is impossible.
    """
    _, text = text_root(model)
    tokens, width = token_table(model).weight.shape
    rank = record.get("rank")
    if not isinstance(rank, int) or not 1 <= rank <= width:
        raise ArtifactError(f"The artifact's token embedding: expected a rank from 1 to {width}, found {rank!r:.50}.")
    text.token_embedding = FactorizedEmbedding(tokens, rank, width)
