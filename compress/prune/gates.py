"""Gates: a vector of ones multiplied into each site; its gradient measures the importance of every unit.

There are two spaces of gates. `separate` (ours) has a gate per head and dim on the queries, one per head and dim (or per
head) on the values, and one per hidden unit after the activation; the output is linear in each gate. `upop` (Shi et al.
2023) has one gate per head dim, shared by all heads and by q, k and v, and one per hidden unit before the activation.

Every sample of a batch has a copy of the gate, so one backward pass yields per-sample gradients [B, groups, units]. A part may be
called several times in a step, and on several rows of a sample (models/owners.py); their gradients add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from clipress.models import anatomy, owners, surgery
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
    dims: int
    """Neighbouring activations of one unit: 2 for the pairs that rotary positions turn."""
    mask: Tensor = field(repr=False)
    """[groups, units]: 1 keeps and 0 cuts a unit; values in between are on their way to 0."""
    copies: dict[int, Tensor] = field(default_factory=dict, repr=False)
    """Zeros [B, groups, units] that are added to the mask, by B: every sample's own change of the gate. They stay from step to
    step, since a compiled model cannot make what gradients are collected in."""

    @property
    def name(self) -> str:
        return f"{self.part.name}.{self.kind}"

    def spread(self, gate: Tensor, width: int) -> Tensor:
        """Expand a gate [..., groups, units] to the activations it multiplies: [..., width]."""
        if self.kind == "heads":  # one value for all dims of a head
            return gate.flatten(-2).repeat_interleave(width // self.units, dim=-1)
        gate = gate.flatten(-2)
        gate = gate if self.dims == 1 else gate.repeat_interleave(self.dims, dim=-1)
        return gate.repeat(*[1] * (gate.ndim - 1), width // gate.shape[-1])  # one gate for all heads, or one per head

    def sides(self) -> tuple[Tensor, Tensor]:
        """Return the weights of every unit on its two sides, q and k or what writes and what reads it: [groups, units, n]."""
        if not isinstance(self.part, Attn):
            pair = torch.cat([linear.weight for linear in self.part.linears_in], 1), self.part.linear_out.weight.T
        else:
            attn = self.part.module
            pair = (attn.q.weight, attn.k.weight) if self.kind == "qk" else (attn.v.weight, attn.out.weight.T)
        return tuple(rows.reshape(self.groups, self.units, -1) for rows in pair)

    def gradient(self) -> Tensor | None:
        """Return this step's per-sample gradients, float32 [B, groups, units], or None before the backward pass."""
        grads = [copy.grad.float() for copy in self.copies.values() if copy.grad is not None]
        return sum(grads) if grads else None

    def own(self, x: Tensor) -> Tensor:
        """Return the copies for the rows of an activation [rows, ...], those of their samples.

        They are float32, since gradients of several calls add up. Raises ValueError for other rows than those whose owners are known.
        """
        found = owners.current()
        samples = len(x) if found is None else found.samples
        if samples not in self.copies:
            dtype = torch.promote_types(x.dtype, torch.float32)
            shape = (samples, self.groups, self.units)
            self.copies[samples] = torch.zeros(shape, device=x.device, dtype=dtype, requires_grad=True)
        if found is None:
            return self.copies[samples]
        if len(x) != len(found.rows):
            raise ValueError(f"{self.name}: expected {len(found.rows)} rows, whose owners are known, found {len(x)}")
        return found.expand(self.copies[samples])


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
                dims = part.qk_unit if kind in ("qk", "attn") else 1
                found.append(Site(part, kind, groups, units, *costs[kind], dims, mask))
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
        "qk": (attn.heads, attn.qk_dim // part.qk_unit),
        "v": (attn.heads, attn.v_dim),
        "attn": (1, attn.qk_dim // part.qk_unit),
    }


def level_costs(part: Part) -> dict[str, tuple[int, int]]:
    """Return (params, MACs for one sample) of one level, by kind.

    In every head, a level of qk is a row of q and of k, or two rows where positions are rotary, and a level of v is a row of v
    and a column of out. A level of ffn is a row of every Linear in and a column of the one out. A norm has a gain and a bias
    for each unit.
    """
    norm = 0 if part.norm is None else 2
    if not isinstance(part, Attn):
        sides = len(part.linears_in) + 1
        biases = sum(linear.bias is not None for linear in part.linears_in)
        return {"ffn": (sides * part.width + biases + norm, sides * part.width * part.tokens)}
    attn, n, m = part.module, part.tokens, part.memory
    h, unit, has_bias = attn.heads, part.qk_unit, [int(linear.bias is not None) for linear in (attn.q, attn.k, attn.v)]
    both, products = part.width + part.memory_width, part.width * n + part.memory_width * m + n * m
    per_dim = {"qk": both + has_bias[0] + has_bias[1], "v": both + has_bias[2] + norm}
    costs = {"qk": (h * unit * per_dim["qk"], h * unit * products), "v": (h * per_dim["v"], h * products)}
    costs["attn"] = tuple(unit * v + qk for qk, v in zip(costs["qk"], costs["v"], strict=True))
    if h:
        pairs = zip(costs["qk"], costs["v"], strict=True)
        costs["heads"] = tuple((attn.qk_dim // unit * qk + attn.v_dim * v) // h for qk, v in pairs)
    return costs


class Gates:
    """Forward hooks that multiply the sites' masks into a model during the search."""

    def __init__(self, model: nn.Module, space: str, kinds: Mapping[str, Sequence[str]] | None = None) -> None:
        self.sites = sites(model, space, kinds)
        self.handles = []
        for site in self.sites:
            gate = _gate(site)
            for module in _gated_inputs(site, space):
                self.handles.append(module.register_forward_pre_hook(lambda _, args, gate=gate: (gate(args[0]),)))
            for linear in _gated_linears(site, space):
                self.handles.append(linear.register_forward_hook(lambda _, __, out, gate=gate: gate(out)))

    def clear(self) -> None:
        """Drop the gradients of the last step."""
        for site in self.sites:
            for copy in site.copies.values():
                copy.grad = None

    def remove(self) -> None:
        """Remove the hooks, so that the model runs without masks again."""
        for handle in self.handles:
            handle.remove()
        for site in self.sites:
            site.copies.clear()

    def part_masks(self) -> list[tuple[Part, surgery.Mask]]:
        """Return every part that has sites, with a mask of the units to keep."""
        by_part: dict[str, list[Site]] = {}
        for site in self.sites:
            by_part.setdefault(site.part.name, []).append(site)
        return [(found[0].part, _part_mask(found)) for found in by_part.values()]


def _gated_inputs(site: Site, space: str) -> list[nn.Module]:
    """Return the modules whose input a site's gate multiplies.

    A norm counts cut units as zeros and shifts them, so their gate is before it and behind it.
    """
    part = site.part
    if isinstance(part, Attn):
        return [] if part.norm is None or site.kind == "qk" else [part.module.out]
    before = [part.norm] if part.norm is not None and space == "separate" else []
    return [*before, part.linear_out] if part.norm is not None or space == "separate" else []


def _gated_linears(site: Site, space: str) -> tuple[nn.Linear, ...]:
    """Return the Linears whose output a site's gate multiplies."""
    if not isinstance(site.part, Attn):
        return () if space == "separate" else (site.part.linear_in,)
    attn = site.part.module
    return {"attn": (attn.q, attn.k, attn.v), "qk": (attn.q,), "v": (attn.v,), "heads": (attn.v,)}[site.kind]


def _gate(site: Site) -> Callable[[Tensor], Tensor]:
    def multiply(x: Tensor) -> Tensor:  # [rows, N, width], or [rows, height, width of the map, width]
        mask = site.spread(site.mask.to(x.dtype), x.shape[-1])
        if not torch.is_grad_enabled():
            return x * mask
        own = site.spread(site.own(x).to(x.dtype), x.shape[-1])
        return x * (mask + own).reshape(len(x), *[1] * (x.ndim - 2), -1)

    return multiply


def _part_mask(found: Sequence[Site]) -> surgery.Mask:
    """Combine the masks of a part's sites."""
    kept = {site.kind: (site.mask != 0).repeat_interleave(site.dims, dim=1) for site in found}
    if "ffn" in kept:
        return surgery.FfnMask(kept["ffn"][0])
    if "attn" in kept:
        kept["qk"] = kept["v"] = kept["attn"].expand(found[0].part.module.heads, -1)
    heads = kept["heads"][0] if "heads" in kept else None
    return surgery.AttnMask(kept.get("qk"), kept.get("v"), heads)
