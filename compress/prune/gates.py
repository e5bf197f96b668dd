"""Gates: a vector of ones multiplied into a site, so that what a unit is worth can be read off its gradient.

Two spaces. `separate`, ours: one gate on the queries per head and dim, one on the values per head and dim, one on the
hidden units after the activation; the output is linear in each. `upop` (Shi et al. 2023): one gate per head dim, shared
by all heads and by q, k and v; one on the hidden units before the activation.

Each sample of a batch has its own copy of the gate, made in the forward pass, so its gradient comes per sample and with
no second backward pass: [B, groups, units].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clipress.models import anatomy
from clipress.models.anatomy import Block
from clipress.models.surgery import Keep


@dataclass
class Site:
    """One set of prunable units. A *level* is one unit of every group; levels are what is kept or cut."""

    block: Block
    kind: str  # "qk", "v", "ffn", or "attn" where one gate rules q, k and v
    groups: int
    units: int
    params: int  # of one level
    macs: int  # of one level, one sample
    mask: Tensor = field(repr=False)  # [groups, units]; 1 keeps, 0 cuts, between: on the way
    copies: list[Tensor] = field(default_factory=list, repr=False)  # this step's, [B, groups * units] each

    @property
    def name(self) -> str:
        return f"{self.block.name}.{self.kind}"

    def gradient(self) -> Tensor | None:
        """Return this step's gradient per sample, float32 [B, groups, units], or None before a backward pass."""
        grads = [copy.grad.float() for copy in self.copies if copy.grad is not None]
        return sum(grads).reshape(-1, self.groups, self.units) if grads else None


def sites(model: nn.Module, space: str) -> list[Site]:
    """List every site of a space with exact costs, derived from the shapes."""
    found = []
    for block in anatomy.blocks(model):
        attn, d, n = block.attn, block.width, block.tokens
        h, bias = attn.heads, int(attn.q.bias is not None)
        costs = {  # of one level: h rows of q and of k; h rows of v and columns of out; a row and a column of the ffn
            "qk": (h * 2 * (d + bias), h * (2 * d * n + n * n)),
            "v": (h * (2 * d + bias), h * (2 * d * n + n * n)),
            "ffn": (2 * d + 1, 2 * d * n),
        }
        costs["attn"] = tuple(a + b for a, b in zip(costs["qk"], costs["v"], strict=True))
        device = attn.q.weight.device
        shapes = {"qk": (h, attn.qk_dim), "v": (h, attn.v_dim), "attn": (1, attn.qk_dim)}
        for kind in ("attn", "ffn") if space == "upop" else ("qk", "v", "ffn"):
            groups, units = shapes.get(kind, (1, block.ffn_in.out_features))
            mask = torch.ones(groups, units, device=device)
            found.append(Site(block, kind, groups, units, *costs[kind], mask))
    return found


class Gates:
    """Hooks that multiply the sites' masks into a model while it is searched."""

    def __init__(self, model: nn.Module, space: str) -> None:
        self.sites = sites(model, space)
        self._handles = []
        for site in self.sites:
            block, gate = site.block, _gate(site)
            if site.kind == "attn":
                targets = (block.attn.q, block.attn.k, block.attn.v)
            else:
                targets = {"qk": (block.attn.q,), "v": (block.attn.v,), "ffn": (block.ffn_in,)}[site.kind]
            for target in targets:
                if site.kind == "ffn" and space == "separate":
                    hook = block.ffn_out.register_forward_pre_hook(lambda _, args, gate=gate: (gate(args[0]),))
                else:
                    hook = target.register_forward_hook(lambda _, __, out, gate=gate: gate(out))
                self._handles.append(hook)

    def clear(self) -> None:
        """Forget the copies of the last step."""
        for site in self.sites:
            site.copies.clear()

    def remove(self) -> None:
        """Take the hooks off; the model computes unmasked again."""
        for handle in self._handles:
            handle.remove()
        self.clear()

    def keeps(self) -> dict[str, tuple[Block, Keep]]:
        """Return what stays of every block: where the mask is not zero."""
        by_block: dict[str, dict[str, Site]] = {}
        for site in self.sites:
            by_block.setdefault(site.block.name, {})[site.kind] = site
        result = {}
        for name, kinds in by_block.items():
            block = next(iter(kinds.values())).block
            kept = {kind: site.mask != 0 for kind, site in kinds.items()}
            if "attn" in kept:
                kept["qk"] = kept["v"] = kept["attn"].expand(block.attn.heads, -1)
            result[name] = (block, Keep(kept["qk"], kept["v"], kept["ffn"][0]))
        return result


def _gate(site: Site) -> Callable[[Tensor], Tensor]:
    def multiply(x: Tensor) -> Tensor:  # [B, N, heads * units]
        mask = site.mask
        if site.groups == 1 and x.shape[-1] != site.units:
            mask = mask.expand(x.shape[-1] // site.units, -1)  # one gate for all heads
        mask = mask.reshape(-1).to(x.dtype)
        if not torch.is_grad_enabled():
            return x * mask
        shape = (len(x), site.groups, site.units)
        own = torch.zeros(shape, device=x.device, dtype=x.dtype, requires_grad=True)
        site.copies.append(own)
        spread = own.expand(-1, x.shape[-1] // site.units if site.groups == 1 else site.groups, -1)
        return x * (mask + spread.flatten(1)).unsqueeze(1)

    return multiply
