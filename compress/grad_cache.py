"""GradCache: the losses see the full batch while the student processes it in chunks.

Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from clipress.compress.random import RandomState, random_state, set_random_state
from clipress.errors import RecipeError


def encode_in_chunks(
    module: nn.Module, inputs: Mapping[str, Tensor], chunks: int
) -> tuple[dict[str, Tensor], list[RandomState]]:
    """Encode a batch in chunks without a graph.

    Returns leaf tensors [B, ...] that collect the loss's gradients, and the state of torch's generators before every chunk.
    """
    seen, states = [], []
    with torch.no_grad(), frozen_statistics(module):
        for chunk in split(inputs, chunks):
            states.append(random_state())
            seen.append(module(**chunk))
    outputs = {name: torch.cat([one[name] for one in seen]) for name, rows in seen[0].items() if rows.ndim}
    scalars = {name: value for name, value in seen[0].items() if not value.ndim}
    return {name: rows.requires_grad_() for name, rows in (outputs | scalars).items()}, states


def backward_in_chunks(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    leaves: Mapping[str, Tensor],
    states: Sequence[RandomState],
    fabric: Fabric,
    after_chunk: Callable[[], None],
) -> None:
    """Encode again in chunks, now with a graph, and backpropagate the gradients collected on the leaves.

    Every chunk is encoded with the random numbers of the first time, so that dropout leaves out the same.
    """
    chunks = len(states)
    rows = {name: leaf.grad for name, leaf in leaves.items() if leaf.ndim and leaf.grad is not None}
    scalars = {name: leaf.grad for name, leaf in leaves.items() if not leaf.ndim}
    pieces = list(zip(split(inputs, chunks), split(rows, chunks), strict=True))
    for number, (chunk, grads) in enumerate(pieces):
        last = number == len(pieces) - 1
        set_random_state(states[number])
        with fabric.no_backward_sync(module, enabled=not last):
            outputs = module(**chunk)
            linear = sum((outputs[name] * grad).sum() for name, grad in grads.items() if outputs[name].requires_grad)
            for name, grad in scalars.items():  # a scalar's gradient covers the full batch, so it is added once
                linear = linear + outputs[name] * (grad if last and grad is not None else 0.0)
            fabric.backward(linear)
        after_chunk()


def split(rows: Mapping[str, Tensor], chunks: int) -> list[dict[str, Tensor]]:
    """Split every tensor along its first axis. Raises RecipeError if they differ in their rows, as questions and answers do."""
    if len({len(tensor) for tensor in rows.values()}) > 1:
        raise RecipeError(
            "runtime.grad_cache_chunks: a batch whose questions have several answers each cannot be cut. Set it to 1, with a smaller "
            "batch_size."
        )
    pieces = {name: tensor.chunk(chunks) for name, tensor in rows.items()}
    count = len(next(iter(pieces.values())))
    return [{name: parts[number] for name, parts in pieces.items()} for number in range(count)]


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """Return every batch norm in a module."""
    return [inner for inner in module.modules() if isinstance(inner, nn.modules.batchnorm._BatchNorm)]


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Leave the running statistics of batch norms unchanged; the second pass updates them."""
    norms = batch_norms(module)
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    yield
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
