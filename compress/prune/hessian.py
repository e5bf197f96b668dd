"""The diagonal of the Hessian, weight by weight, as in torch-pruning's `GroupHessianImportance`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clipress.compress.prune.criterion import CRITERIA, Criterion
from clipress.compress.prune.gates import Site
from clipress.models.anatomy import Attn


@CRITERIA.register("hessian")
class Hessian(Criterion):
    """Sum of g^2 w^2 over a unit's weights and over samples, with g the gradient of a sample's loss by the weight w.

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
            x = args[0].detach()
            if not output.requires_grad:  # nothing before it is trained
                output.requires_grad_()
            output.register_hook(lambda gradient: add(_scores(linear.weight.detach(), x, gradient, site, side)))

    return hook


@torch.no_grad()
def _scores(weight: Tensor, x: Tensor, gradient: Tensor, site: Site, side: str) -> Tensor:
    """Return the summed squares of g w: [groups, units]. x: [B, N, in], gradient: [B, N, out]."""
    x, gradient = x.reshape(len(x), -1, x.shape[-1]), gradient.reshape(len(x), -1, gradient.shape[-1])
    total = torch.zeros(weight.shape[0 if side == "rows" else 1], dtype=torch.float64, device=weight.device)
    for inputs, slopes in zip(x.float(), gradient.float(), strict=True):  # one sample at a time, to save memory
        squares = (slopes.T @ inputs * weight.float()).square().sum(1 if side == "rows" else 0, dtype=torch.float64)
        total += torch.where(squares.isfinite().all(), squares, 0.0)
    return total.reshape(site.groups, site.units, -1).sum(2)
