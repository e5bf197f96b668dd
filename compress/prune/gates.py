"""Gates: a vector of ones multiplied into a site, so that what a unit is worth can be read off its gradient.

Two spaces. `separate`, ours: one gate on the queries per head and dim, one on the values per head and dim (or one per
head), one on the hidden units after the activation; the output is linear in each. `upop` (Shi et al. 2023): one gate per
head dim, shared by all heads and by q, k and v; one on the hidden units before the activation.

Each sample of a batch has its own copy of the gate, made in the forward pass, so its gradient comes per sample and with
no second backward pass: [B, groups, units].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clipress.models import anatomy
from clipress.models.anatomy import Block
from clipress.models.surgery import Keep

KINDS = ("heads", "qk", "v", "ffn")


@dataclass
class Site:
    """One set of prunable units. A *level* is one unit of every group; levels are what is kept or cut."""

    block: Block
    kind: str  # "heads", "qk", "v", "ffn", or "attn" where one gate rules q, k and v
    groups: int
    units: int
    params: int  # of one level
    macs: int  # of one level, one sample
    mask: Tensor = field(repr=False)  # [groups, units]; 1 keeps, 0 cuts, between: on the way
    copies: list[Tensor] = field(default_factory=list, repr=False)  # this step's, [B, groups, units] each

    @property
    def name(self) -> str:
        return f"{self.block.name}.{self.kind}"

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


def sites(model: nn.Module, space: str, wanted: Mapping[str, Sequence[str]] | None = None) -> list[Site]:
    """List the sites of a space with exact costs, derived from the shapes.

    `wanted` names the kinds per tower; absent: q·k, v·out and ffn of both.
    """
    found = []
    for block in anatomy.blocks(model):
        attn, d, n = block.attn, block.width, block.tokens
        h, bias = attn.heads, int(attn.q.bias is not None)
        costs = {  # of one level: h rows of q and of k; h rows of v and columns of out; a row and a column of the ffn
            "qk": (h * 2 * (d + bias), h * (2 * d * n + n * n)),
            "v": (h * (2 * d + bias), h * (2 * d * n + n * n)),
            "ffn": (2 * d + 1, 2 * d * n),
        }
        costs["attn"] = _added(costs["qk"], costs["v"])
        if h:
            whole = _added([c * attn.qk_dim for c in costs["qk"]], [c * attn.v_dim for c in costs["v"]])
            costs["heads"] = tuple(c // h for c in whole)
        shapes = {"heads": (1, h), "qk": (h, attn.qk_dim), "v": (h, attn.v_dim), "attn": (1, attn.qk_dim)}
        kinds = wanted[block.tower] if wanted else ("qk", "v", "ffn")
        if space == "upop":  # q, k and v cannot be told apart there
            kinds = ["attn"] * ("qk" in kinds or "v" in kinds) + [kind for kind in kinds if kind == "ffn"]
        for kind in kinds:
            groups, units = shapes.get(kind, (1, block.ffn_in.out_features))
            if groups and units:
                mask = torch.ones(groups, units, device=attn.q.weight.device)
                found.append(Site(block, kind, groups, units, *costs[kind], mask))
    return found


def _added(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


class Gates:
    """Hooks that multiply the sites' masks into a model while it is searched."""

    def __init__(self, model: nn.Module, space: str, wanted: Mapping[str, Sequence[str]] | None = None) -> None:
        self.sites = sites(model, space, wanted)
        self._handles = []
        for site in self.sites:
            attn, gate = site.block.attn, _gate(site)
            if site.kind == "ffn" and space == "separate":
                hook = site.block.ffn_out.register_forward_pre_hook(lambda _, args, gate=gate: (gate(args[0]),))
                self._handles.append(hook)
                continue
            gated = {"attn": (attn.q, attn.k, attn.v), "qk": (attn.q,), "v": (attn.v,), "heads": (attn.v,)}
            for linear in gated.get(site.kind, (site.block.ffn_in,)):
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

    def keeps(self) -> list[tuple[Block, Keep]]:
        """Return what stays of every block that has a site: where the mask is not zero."""
        by_block: dict[str, dict[str, Site]] = {}
        for site in self.sites:
            by_block.setdefault(site.block.name, {})[site.kind] = site
        result = []
        for kinds in by_block.values():
            block = next(iter(kinds.values())).block
            attn, device = block.attn, block.attn.q.weight.device
            kept = {kind: site.mask != 0 for kind, site in kinds.items()}
            if "attn" in kept:
                kept["qk"] = kept["v"] = kept["attn"].expand(attn.heads, -1)
            everything = {
                "heads": torch.ones(1, attn.heads, dtype=torch.bool, device=device),
                "qk": torch.ones(attn.heads, attn.qk_dim, dtype=torch.bool, device=device),
                "v": torch.ones(attn.heads, attn.v_dim, dtype=torch.bool, device=device),
                "ffn": torch.ones(1, block.ffn_in.out_features, dtype=torch.bool, device=device),
            }
            kept = everything | kept
            result.append((block, Keep(kept["qk"], kept["v"], kept["ffn"][0], kept["heads"][0])))
        return result


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
