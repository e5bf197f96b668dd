"""Refit the output projections of a cut model in closed form, block by block, so that its residual stream follows the uncut one.

X is what enters a projection in the cut model, with everything before it refitted already; T is what it would have to put out
for the residual stream to equal the uncut model's. Ridge regression towards the cut weights W0, on centred X and T:
W = (X'X + l I)^-1 (X'T + l W0), l = ridge x the mean of X'X's diagonal; the bias takes up the means. Later blocks so correct what
earlier ones lost.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from clipress.compress.calibration import Samples, random_projection
from clipress.compress.fabric import Reduce
from clipress.compress.prune.stream import BlockInputs, Reached, copies, hooks, passed, streams_into
from clipress.models import anatomy
from clipress.models.anatomy import Attn, Block, Part
from clipress.models.load import Model
from clipress.recipe import Section
from clipress.tasks import Task, task_named

CutPart = Callable[[Part], None]


class Refit(Section):
    """Settings of `prune.refit`."""

    samples: int = Field(2048, ge=1)
    """Number of training items."""
    ridge: float = Field(1e-3, gt=0)
    """Pull towards the cut weights, relative to the mean square of the inputs."""
    target: Literal["residual", "own"] = "residual"
    """What a projection is fitted to: the uncut model's residual stream, so that it corrects earlier errors too, or the uncut
    projection's own output."""
    probes: int = Field(0, ge=0)
    """Random projections of the output that find how much each token matters; 0: all tokens count alike."""
    projection: bool = True
    """Refit the projection of the pooled features too."""


class Regression:
    """Ridge regression of targets [n, out] on inputs [n, in], from float64 sums over batches."""

    def __init__(self) -> None:
        self.sums: tuple[Tensor, ...] | None = None

    def add(self, x: Tensor, t: Tensor, weight: Tensor | None = None) -> None:
        """Add rows x [..., in] with targets t [..., out]; `weight` [...] counts them."""
        x, t = x.detach().flatten(0, -2).double(), t.detach().flatten(0, -2).double()
        w = x.new_ones(len(x), 1) if weight is None else weight.reshape(-1, 1).double()
        weighted = x * w
        new = (weighted.T @ x, weighted.T @ t, weighted.sum(0), (t * w).sum(0), w.sum())
        self.sums = new if self.sums is None else tuple(a + b for a, b in zip(self.sums, new, strict=True))

    def solve(self, linear: nn.Linear, ridge: float, reduce: Reduce, keep: Tensor | None = None) -> None:
        """Set the weights of a Linear; `keep` [out] marks outputs that stay as they are."""
        xx, xt, x, t, n = (reduce(total) for total in self.sums)
        size = xx.diagonal().mean() if len(xx) else 0.0
        if linear.bias is not None:
            x, t = x / n, t / n
            xx, xt = xx - n * torch.outer(x, x), xt - n * torch.outer(x, t)
        old = linear.weight.double().T
        if len(xx):
            # Inputs that are constant leave only rounding errors once they are centred.
            penalty = ridge * torch.maximum(xx.diagonal().mean(), 1e-6 * size).clamp_min(1e-30)
            new = torch.linalg.solve(xx + penalty * torch.eye(len(xx)).to(xx), xt + penalty * old)
        else:
            new = old
        rows = slice(None) if keep is None else ~keep
        linear.weight[rows] = new.T.to(linear.weight)[rows]
        if linear.bias is not None:
            linear.bias[rows] = (t - x @ new).to(linear.bias)[rows]


@torch.no_grad()
def cut_and_refit(
    blocks: Sequence[Block],
    model: Model,
    samples: Iterable[Samples],
    cut: CutPart,
    settings: Refit,
    reduce: Reduce = lambda total: total,
) -> bool:
    """Cut the blocks of one tower in order and refit them, in place.

    Args:
        blocks: all blocks of the tower.
        model: the uncut model.
        samples: calibration batches; they are read several times.
        cut: cuts a part.
        settings: the settings of the refit.
        reduce: sums a tensor over processes.

    Returns False, with nothing cut, if no sample reaches the tower.
    """
    module, task, tower = model.module.eval(), task_named(model.task), blocks[0].tower
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dense = streams_into(blocks[0], module, task, samples, folder)
        if not dense:
            return False
        weights = token_weights(blocks, module, task, samples, settings.probes) if settings.probes else None
        streams = _Streams(dense, folder, settings, reduce)
        for number, block in enumerate(blocks):
            streams.pass_block(block, cut, weights[number] if weights else [None] * len(dense))
        found = anatomy.projection(module, tower) if settings.projection else None
        if found is not None:
            Projection(found, blocks, module, task, samples).refit(streams.dense, streams.own, settings.ridge, reduce)
    return True


class _Streams:
    """The uncut and the cut residual stream of one tower, up to the same block."""

    def __init__(self, dense: list[BlockInputs], folder: Path, settings: Refit, reduce: Reduce) -> None:
        self.dense, self.settings, self.reduce = dense, settings, reduce
        self.own = copies(dense, folder, "own")
        self.middle = copies(dense, folder, "middle")
        """The uncut stream between attention and feed-forward."""
        self.start = copies(dense, folder, "start") if settings.target == "own" else None
        """The uncut stream before the block."""

    def pass_block(self, block: Block, cut: CutPart, weights: Sequence[Tensor | None]) -> None:
        """Move both streams past a block; in between, cut and refit it."""
        self._pass_uncut(block)
        for part in block.parts:
            cut(part)
        for part in block.parts:
            self._refit(block, part, weights)
        for one in self.own:
            one.x.copy_(one.run(block.module))

    def _pass_uncut(self, block: Block) -> None:
        for number, (one, middle) in enumerate(zip(self.dense, self.middle, strict=True)):
            if self.start is not None:
                self.start[number].x.copy_(one.x)
            after, added = _run_until(block, one, None)
            middle.x.copy_(one.x + added)
            one.x.copy_(after)

    def _refit(self, block: Block, part: Part, weights: Sequence[Tensor | None]) -> None:
        regression, gain, linear = Regression(), block.gain(part), output_of(part)
        is_attention = isinstance(part, Attn)
        for number, (own, weight) in enumerate(zip(self.own, weights, strict=True)):
            x, added = _run_until(block, own, part)
            before, wanted = (own.x, self.middle) if is_attention else (own.x + added, self.dense)
            if self.start is not None:
                before = (self.start if is_attention else self.middle)[number].x
            t = (wanted[number].x - before).to(x.device)
            regression.add(x, t if gain is None else t / gain.where(gain != 0, 1.0), weight)
        regression.solve(linear, self.settings.ridge, self.reduce, None if gain is None else gain == 0)


def output_of(part: Part) -> nn.Linear:
    """Return the Linear through which a part writes to the residual stream."""
    return part.module.out if isinstance(part, Attn) else part.linear_out


def _run_until(block: Block, inputs: BlockInputs, part: Part | None) -> tuple[Tensor, Tensor]:
    """Run a block up to the output projection of a part, or to its end.

    Returns what enters the projection [B, N, in], or leaves the block [B, N, W]; and what attention added to the stream.
    """
    attn = block.parts[0]
    seen: dict[str, Tensor] = {}

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["result"] = args[0]
        raise Reached

    handles = [attn.module.out.register_forward_hook(lambda _, __, y: seen.update(added=y))]
    if part is not None:
        handles.append(output_of(part).register_forward_pre_hook(stop))
    with hooks(handles), suppress(Reached):
        seen["result"] = inputs.run(block.module)
    if part is not None and part.name == attn.name and not attn.module.heads:  # without heads, `out` does not run
        seen["result"] = inputs.x.new_zeros(*inputs.x.shape[:2], 0)
    bias = attn.module.out.bias
    added = seen.get("added", inputs.x.new_zeros(()) if bias is None else bias)
    gain = block.gain(attn)
    return seen["result"], (added if gain is None else added * gain).to(inputs.x)


class Projection:
    """The map from a tower's pooled features to its output, a Linear or a bare matrix."""

    def __init__(
        self,
        found: nn.Linear | nn.Parameter,
        blocks: Sequence[Block],
        module: nn.Module,
        task: Task,
        samples: Iterable[Samples],
    ) -> None:
        self.found, self.blocks, self.module, self.task, self.samples = found, blocks, module, task, samples

    def refit(self, dense: Sequence[BlockInputs], own: Sequence[BlockInputs], ridge: float, reduce: Reduce) -> None:
        """Fit it to what it made of the uncut model's stream behind the last block; `own` is the cut model's."""
        matrix = self.found.weight.T if isinstance(self.found, nn.Linear) else self.found
        wanted = [features @ matrix for features in self._features(dense)]
        regression, linear = Regression(), self.found
        if not isinstance(linear, nn.Linear):
            linear = nn.Linear(*self.found.shape, bias=False, device=self.found.device)
            linear.weight = nn.Parameter(self.found.data.T)
        for features, rows in zip(self._features(own), wanted, strict=True):
            regression.add(features, rows if linear.bias is None else rows + linear.bias)
        regression.solve(linear, ridge, reduce)
        if linear is not self.found:
            self.found.copy_(linear.weight.T)

    def _features(self, stream: Sequence[BlockInputs]) -> Iterator[Tensor]:
        """Yield the pooled features of every batch: [B, in]. In front of a bare matrix they are normalized, as outputs are."""
        graph, seen = self.task.graph_of(self.blocks[0].tower), list[Tensor]()
        batches = (batch[graph] for batch in self.samples if graph in batch)
        for inputs, last in zip(batches, stream, strict=True):
            if isinstance(self.found, nn.Linear):
                with hooks([self.found.register_forward_pre_hook(lambda _, args: seen.append(args[0]))]):
                    self._call(inputs, last.x)
                yield seen.pop()
            else:
                matrix = self.found.data
                self.found.data = torch.eye(len(matrix)).to(matrix)
                features = self._call(inputs, last.x)
                self.found.data = matrix
                yield features

    def _call(self, inputs: dict[str, Tensor], last: Tensor) -> Tensor:
        """Return the tower's output where `last` leaves its last block."""
        with passed(self.blocks, last.to(next(self.module.parameters()).device)):
            return next(iter(self.task.call(self.module, self.task.graph_of(self.blocks[0].tower), inputs).values()))


def token_weights(
    blocks: Sequence[Block], module: nn.Module, task: Task, samples: Iterable[Samples], probes: int
) -> list[list[Tensor]]:
    """Return how much every token matters after every block: per block and batch, [B, N].

    It is the mean squared gradient of random projections of the output, so a token that no later block reads counts nothing,
    such as those after the end of a text, or those that are not pooled in the last block.
    """
    found: list[list[Tensor]] = [[] for _ in blocks]
    generator, graph = torch.Generator().manual_seed(0), task.graph_of(blocks[0].tower)
    for batch in samples:
        if graph not in batch:
            continue
        sums = [0.0] * len(blocks)
        for _ in range(probes):
            for number, gradient in enumerate(_probe(blocks, module, task, batch[graph], generator)):
                sums[number] = sums[number] + gradient.square().sum(-1)
        for own, total in zip(found, sums, strict=True):
            own.append(total)
    return found


@torch.enable_grad()
def _probe(
    blocks: Sequence[Block], module: nn.Module, task: Task, inputs: dict[str, Tensor], generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Return the gradients of one random projection of the outputs at the output of every block: [B, N, W] each."""
    outs: list[Tensor] = []
    start = blocks[0].module.register_forward_pre_hook(lambda _, args: (args[0].requires_grad_(), *args[1:]))
    with hooks([start, *(block.module.register_forward_hook(lambda _, __, out: outs.append(out)) for block in blocks)]):
        y = next(iter(task.call(module, task.graph_of(blocks[0].tower), inputs).values()))
    return torch.autograd.grad(random_projection(y, generator), outs)
