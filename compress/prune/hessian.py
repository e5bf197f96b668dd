"""The diagonal of the Hessian, weight by weight, as in torch-pruning's `GroupHessianImportance`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clipress.compress.prune.criterion import CRITERIA, Criterion
from clipress.compress.prune.gates import Site
from clipress.models import owners
from clipress.models.anatomy import Attn


@CRITERIA.register("hessian")
class Hessian(Criterion):
    """Sum of g^2 w^2 over a unit's weights and over samples, with g the gradient of a sample's loss by the weight w.

    Calls of a Linear in one step count apart, as those of a BLIP that reads texts alone and beside images.
    `fisher` sums g w over the unit's weights before it squares, which counts how they act together.
    """

    from_gates = False

    def watch(self, sites: Sequence[Site], add: Callable[[int, Tensor], None]) -> list[RemovableHandle]:
        return [
            linear.register_forward_hook(_on_backward(lambda scores, at=at: add(at, scores), site, side))
            for at, site in enumerate(sites)
            for linear, side in _linears(site)
        ]


def _linears(site: Site) -> list[tuple[nn.Linear, str]]:
    """Return the Linears whose weights a site's units have, with the side that the units are on."""
    if not isinstance(site.part, Attn):
        return [*((linear, "rows") for linear in site.part.linears_in), (site.part.linear_out, "columns")]
    attn = site.part.module
    return [(attn.q, "rows"), (attn.k, "rows")] if site.kind == "qk" else [(attn.v, "rows"), (attn.out, "columns")]


def _on_backward(add: Callable[[Tensor], None], site: Site, side: str) -> Callable:
    """Return a forward hook: in the backward pass, `add` receives the scores [groups, units] of the batch."""

    def hook(linear: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():
            x, known = args[0].detach(), owners.current()
            owner = torch.arange(len(x), device=x.device) if known is None else known.rows
            if not output.requires_grad:  # nothing before it is trained
                output.requires_grad_()
            output.register_hook(lambda gradient: add(_scores(linear.weight.detach(), x, gradient, owner, site, side)))

    return hook


@torch.no_grad()
def _scores(weight: Tensor, x: Tensor, gradient: Tensor, owner: Tensor, site: Site, side: str) -> Tensor:
    """Return the summed squares of g w: [groups, units].

    x: [rows, N, in], gradient: [rows, N, out], owner: [rows], the sample of every row.
    """
    owner, order = owner.sort()
    x, gradient = (rows[order].reshape(len(rows), -1, rows.shape[-1]).float() for rows in (x, gradient))
    is_first = torch.ones_like(owner, dtype=torch.bool)  # of its sample's rows
    is_first[1:] = owner[1:] != owner[:-1]
    product = torch.zeros_like(weight, dtype=torch.float32)
    total = torch.zeros(weight.shape[0 if side == "rows" else 1], dtype=torch.float64, device=weight.device)
    # One row at a time, to save memory: at a sample's last row the product is that of all its rows. Nothing waits for the device.
    for inputs, slopes, first, last in zip(x, gradient, is_first, is_first.roll(-1), strict=True):
        product = product.where(~first, 0.0) + slopes.T @ inputs
        squares = (product * weight.float()).square().sum(1 if side == "rows" else 0, dtype=torch.float64)
        total += squares.where(last & squares.isfinite().all(), 0.0)
    return total.reshape(site.groups, site.units, -1).sum(2)
