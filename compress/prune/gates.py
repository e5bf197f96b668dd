"""Gates: a vector of ones multiplied into each site; its gradient measures the importance of every unit.

There are two spaces of gates. `separate` (ours) has a gate per head and dim on the queries, one per head and dim (or per
head) on the values, and one per hidden unit after the activation; the output is linear in each gate. `upop` (Shi et al.
2023) has one gate per head dim, shared by all heads and by q, k and v, and one per hidden unit before the activation.

The forward pass creates a copy of the gate for each sample, so one backward pass yields per-sample gradients
[B, groups, units].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from clipress.models import anatomy, surgery
from clipress.models.anatomy import Attn, Part

Kind = Literal["heads", "qk", "v", "ffn"]
DEFAULT_KINDS: tuple[Kind, ...] = ("qk", "v", "ffn")


@dataclass
class Site:
    """A set of prunable units in a part. Units are kept or cut in *levels* of one unit per group."""

    part: Part
    kind: str
    """`heads`, `qk`, `v`, `ffn`, or `attn` if q, k and v share a gate."""
    groups: int
    units: int
    params: int
    """Parameters of one level."""
    macs: int
    """Multiply-accumulates of one level for one sample."""
    mask: Tensor = field(repr=False)
    """[groups, units]: 1 keeps and 0 cuts a unit; values in between are on their way to 0."""
    copies: list[Tensor] = field(default_factory=list, repr=False)
    """This step's gates, [B, groups, units] each."""

    @property
    def name(self) -> str:
        return f"{self.part.name}.{self.kind}"

    def spread(self, gate: Tensor, width: int) -> Tensor:
        """Expand a gate [..., groups, units] to the activations it multiplies: [..., width]."""
        if self.kind == "heads":  # one value for all dims of a head
            return gate.flatten(-2).repeat_interleave(width // self.units, dim=-1)
        repeats = width // (self.groups * self.units)  # one gate for all heads, or one per head
        return gate.flatten(-2).repeat(*[1] * (gate.ndim - 2), repeats)

    def gradient(self) -> Tensor | None:
        """Return this step's per-sample gradients, float32 [B, groups, units], or None before the backward pass."""
        grads = [copy.grad.float() for copy in self.copies if copy.grad is not None]
        return sum(grads) if grads else None


def sites(model: nn.Module, space: str, kinds: Mapping[str, Sequence[str]] | None = None) -> list[Site]:
    """List the sites of a space, with exact costs from the shapes.

    `kinds` maps towers to the kinds of sites that may be cut; the default is `DEFAULT_KINDS`.
    """
    found = []
    for part in anatomy.parts(model):
        costs, sizes = level_costs(part), _sizes(part)
        for kind in _kinds_of(part, space, (kinds or {}).get(part.tower, DEFAULT_KINDS)):
            groups, units = sizes[kind]
            if groups and units:
                mask = torch.ones(groups, units, device=next(_module(part).parameters()).device)
                found.append(Site(part, kind, groups, units, *costs[kind], mask))
    return found


def _module(part: Part) -> nn.Module:
    return part.module if isinstance(part, Attn) else part.parent


def _kinds_of(part: Part, space: str, kinds: Sequence[str]) -> list[str]:
    """Return the kinds of sites that a part has in a space."""
    if not isinstance(part, Attn):
        return ["ffn"] * ("ffn" in kinds)
    if space == "upop":  # q, k and v share a gate
        return ["attn"] * ("qk" in kinds or "v" in kinds)
    return [kind for kind in kinds if kind != "ffn"]


def _sizes(part: Part) -> dict[str, tuple[int, int]]:
    """Return (groups, units) by kind."""
    if not isinstance(part, Attn):
        return {"ffn": (1, part.hidden)}
    attn = part.module
    return {
        "heads": (1, attn.heads),
        "qk": (attn.heads, attn.qk_dim),
        "v": (attn.heads, attn.v_dim),
        "attn": (1, attn.qk_dim),
    }


def level_costs(part: Part) -> dict[str, tuple[int, int]]:
    """Return (params, MACs for one sample) of one level, by kind.

    In every head, a level of qk is a row of q and of k, and a level of v is a row of v and a column of out. A level of ffn
    is a row of the first Linear and a column of the second.
    """
    if not isinstance(part, Attn):
        bias = int(part.linear_in.bias is not None)
        return {"ffn": (2 * part.width + bias, 2 * part.width * part.tokens)}
    attn, n, m = part.module, part.tokens, part.memory
    h, bias = attn.heads, int(attn.q.bias is not None)
    both, products = part.width + part.memory_width, part.width * n + part.memory_width * m + n * m
    costs = {"qk": (h * (both + 2 * bias), h * products), "v": (h * (both + bias), h * products)}
    costs["attn"] = tuple(a + b for a, b in zip(costs["qk"], costs["v"], strict=True))
    if h:
        pairs = zip(costs["qk"], costs["v"], strict=True)
        costs["heads"] = tuple((attn.qk_dim * qk + attn.v_dim * v) // h for qk, v in pairs)
    return costs


class Gates:
    """Forward hooks that multiply the sites' masks into a model during the search."""

    def __init__(self, model: nn.Module, space: str, kinds: Mapping[str, Sequence[str]] | None = None) -> None:
        self.sites = sites(model, space, kinds)
        self.handles = []
        for site in self.sites:
            gate = _gate(site)
            if site.kind == "ffn" and space == "separate":
                linear = site.part.linear_out
                self.handles.append(linear.register_forward_pre_hook(lambda _, args, gate=gate: (gate(args[0]),)))
                continue
            for linear in _gated_linears(site):
                self.handles.append(linear.register_forward_hook(lambda _, __, out, gate=gate: gate(out)))

    def clear(self) -> None:
        """Drop the gate copies of the last step."""
        for site in self.sites:
            site.copies.clear()

    def remove(self) -> None:
        """Remove the hooks, so that the model runs without masks again."""
        for handle in self.handles:
            handle.remove()
        self.clear()

    def part_masks(self) -> list[tuple[Part, surgery.Mask]]:
        """Return every part that has sites, with a mask of the units to keep."""
        by_part: dict[str, list[Site]] = {}
        for site in self.sites:
            by_part.setdefault(site.part.name, []).append(site)
        return [(found[0].part, _part_mask(found)) for found in by_part.values()]


def _gated_linears(site: Site) -> tuple[nn.Linear, ...]:
    if not isinstance(site.part, Attn):
        return (site.part.linear_in,)
    attn = site.part.module
    return {"attn": (attn.q, attn.k, attn.v), "qk": (attn.q,), "v": (attn.v,), "heads": (attn.v,)}[site.kind]


def _gate(site: Site) -> Callable[[Tensor], Tensor]:
    def multiply(x: Tensor) -> Tensor:  # [B, N, width]
        mask = site.spread(site.mask.to(x.dtype), x.shape[-1])
        if not torch.is_grad_enabled():
            return x * mask
        shape = (len(x), site.groups, site.units)
        own = torch.zeros(shape, device=x.device, dtype=x.dtype, requires_grad=True)
        site.copies.append(own)
        return x * (mask + site.spread(own, x.shape[-1])).unsqueeze(1)

    return multiply


def _part_mask(found: Sequence[Site]) -> surgery.Mask:
    """Combine the masks of a part's sites."""
    kept = {site.kind: site.mask != 0 for site in found}
    if "ffn" in kept:
        return surgery.FfnMask(kept["ffn"][0])
    if "attn" in kept:
        kept["qk"] = kept["v"] = kept["attn"].expand(found[0].part.module.heads, -1)
    heads = kept["heads"][0] if "heads" in kept else None
    return surgery.AttnMask(kept.get("qk"), kept.get("v"), heads)
