"""Gates: a vector of ones multiplied into each site, whose gradient measures the importance of every unit.

Two spaces. `separate`, ours: one gate on the queries per head and dim, one on the values per head and dim (or one per
head), one on the hidden units after the activation; the output is linear in each. `upop` (Shi et al. 2023): one gate per
head dim, shared by all heads and by q, k and v; one on the hidden units before the activation.

Each sample of a batch has its own copy of the gate, made in the forward pass, so the ordinary backward pass yields a
gradient per sample: [B, groups, units].
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
    """One set of prunable units of a part. A *level* is one unit of every group; levels are what is kept or cut."""

    part: Part
    kind: str
    """`heads`, `qk`, `v`, `ffn`, or `attn` where one gate rules q, k and v."""
    groups: int
    units: int
    params: int
    """Of one level."""
    macs: int
    """Of one level, one sample."""
    mask: Tensor = field(repr=False)
    """[groups, units]: 1 keeps, 0 cuts, a value between is on its way to 0."""
    copies: list[Tensor] = field(default_factory=list, repr=False)
    """This step's gates, [B, groups, units] each."""

    @property
    def name(self) -> str:
        return f"{self.part.name}.{self.kind}"

    def spread(self, gate: Tensor, width: int) -> Tensor:
        """Repeat a gate [..., groups, units] over the activations it rules: [..., width]."""
        if self.kind == "heads":  # one number for all dims of a head
            return gate.flatten(-2).repeat_interleave(width // self.units, dim=-1)
        repeats = width // (self.groups * self.units)  # one gate for all heads, or one per head
        return gate.flatten(-2).repeat(*[1] * (gate.ndim - 2), repeats)

    def gradient(self) -> Tensor | None:
        """Return this step's gradient per sample, float32 [B, groups, units], or None before a backward pass."""
        grads = [copy.grad.float() for copy in self.copies if copy.grad is not None]
        return sum(grads) if grads else None


def sites(model: nn.Module, space: str, kinds: Mapping[str, Sequence[str]] | None = None) -> list[Site]:
    """List the sites of a space with exact costs, derived from the shapes.

    `kinds` maps a tower to what may be cut in it; a tower that is absent has `DEFAULT_KINDS`.
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


def _kinds_of(part: Part, space: str, wanted: Sequence[str]) -> list[str]:
    """Return the kinds of sites of a part, as the space has them."""
    if not isinstance(part, Attn):
        return ["ffn"] * ("ffn" in wanted)
    if space == "upop":  # its gates are shared by q, k and v
        return ["attn"] * ("qk" in wanted or "v" in wanted)
    return [kind for kind in wanted if kind != "ffn"]


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
    """Return (params, MACs on one sample) of one level, by kind.

    A level of qk is a row of q and of k in every head, one of v is a row of v and a column of out; a level of ffn is a row
    of the first and a column of the second Linear.
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
    """Hooks that multiply the sites' masks into a model while it is searched."""

    def __init__(self, model: nn.Module, space: str, kinds: Mapping[str, Sequence[str]] | None = None) -> None:
        self.sites = sites(model, space, kinds)
        self._handles = []
        for site in self.sites:
            gate = _gate(site)
            if site.kind == "ffn" and space == "separate":
                linear = site.part.linear_out
                self._handles.append(linear.register_forward_pre_hook(lambda _, args, gate=gate: (gate(args[0]),)))
                continue
            for linear in _gated_linears(site):
                self._handles.append(linear.register_forward_hook(lambda _, __, out, gate=gate: gate(out)))

    def clear(self) -> None:
        """Forget the copies of the last step."""
        for site in self.sites:
            site.copies.clear()

    def remove(self) -> None:
        """Take the hooks off; the model computes unmasked again."""
        for handle in self._handles:
            handle.remove()
        self.clear()

    def part_masks(self) -> list[tuple[Part, surgery.Mask]]:
        """Return every part that has a site, with what stays of it: where the mask is not zero."""
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
    """Return what the masks of one part's sites leave of it."""
    kept = {site.kind: site.mask != 0 for site in found}
    if "ffn" in kept:
        return surgery.FfnMask(kept["ffn"][0])
    if "attn" in kept:
        kept["qk"] = kept["v"] = kept["attn"].expand(found[0].part.module.heads, -1)
    heads = kept["heads"][0] if "heads" in kept else None
    return surgery.AttnMask(kept.get("qk"), kept.get("v"), heads)
