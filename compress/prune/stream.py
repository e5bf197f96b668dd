"""The residual stream of a tower on calibration samples, moved on block by block.

One batch is one memory-mapped file, so that memory holds little more than the current block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from clipress.compress.calibration import Samples, mapped
from clipress.models.anatomy import Block
from clipress.tasks import Task


@dataclass(frozen=True)
class BlockInputs:
    """One batch on its way through a tower's blocks."""

    x: Tensor
    """The stream, float32 [B, N, W], memory-mapped."""
    rest: tuple[Any, ...]
    """The other arguments of a block, such as the mask; every block gets the same."""
    named: dict[str, Any]

    def run(self, block: nn.Module) -> Tensor:
        """Return what a block makes of it: [B, N, W]."""
        return block(self.x.to(next(block.parameters()).device), *self.rest, **self.named)


class Reached(Exception):
    """Ends a forward pass once everything wanted has been seen."""


def streams_into(
    block: Block, module: nn.Module, task: Task, samples: Iterable[Samples], folder: Path
) -> list[BlockInputs]:
    """Run the samples up to the first block of a tower. Returns one batch per file; empty if no sample reaches it."""
    found, graph = list[BlockInputs](), task.graph_of(block.tower)

    def keep(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append(BlockInputs(mapped(args[0], folder / f"dense-{len(found)}.npy"), args[1:], named))
        raise Reached

    with hooks([block.module.register_forward_pre_hook(keep, with_kwargs=True)]):
        for batch in samples:
            if graph in batch:
                with suppress(Reached):
                    task.call(module, graph, batch[graph])
    return found


def copies(stream: Iterable[BlockInputs], folder: Path, name: str) -> list[BlockInputs]:
    """Return a stream that can move on by itself."""
    return [replace(one, x=mapped(one.x, folder / f"{name}-{number}.npy")) for number, one in enumerate(stream)]


@contextmanager
def hooks(handles: Iterable[Any]) -> Iterator[None]:
    """Remove hooks on leaving."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def passed(blocks: Sequence[Block], last: Tensor) -> Iterator[None]:
    """Make the blocks of a tower compute nothing, and put out the stream `last` [B, N, W] in the end."""
    for block in blocks:
        block.module.forward = lambda *_, **__: last
    try:
        yield
    finally:
        for block in blocks:
            del block.module.forward
