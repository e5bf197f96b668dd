"""What may be cut: the attentions and feed-forwards of blocks, and the names of their layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from clipress.models.attention import Attention
from clipress.models.partial_norm import Norm, is_known_norm

CROSS = "cross"  # a block's list of cross-attentions


@dataclass(frozen=True)
class Attn:
    """One attention that may be cut: `tokens` queries attend to `memory` keys, which is `tokens` for self-attention."""

    tower: str
    name: str
    """Its module path."""
    block: str
    """The path of the block that it belongs to."""
    module: Attention
    tokens: int
    memory: int

    @property
    def is_cross(self) -> bool:
        """Whether it reads another tower's tokens instead of its own."""
        return self.name.removeprefix(self.block).startswith(f".{CROSS}.")

    @property
    def width(self) -> int:
        return self.module.q.in_features

    @property
    def memory_width(self) -> int:
        return self.module.k.in_features

    @property
    def qk_unit(self) -> int:
        """How many query and key dims are cut together: two where positions are rotary."""
        return getattr(self.module, "qk_unit", 1)

    @property
    def norm(self) -> Norm | None:
        """The norm between the heads' joint output and the output projection, if there is one."""
        norm = getattr(self.module, "norm", None)
        return norm if is_known_norm(norm) else None

    @property
    def shape(self) -> dict[str, Any]:
        """Sizes that the architecture no longer determines once this part has been cut."""
        attn = self.module
        return {"heads": attn.heads, "qk_dim": attn.qk_dim, "v_dim": attn.v_dim, "scale": attn.scale}


@dataclass(frozen=True)
class FfnNames:
    """The names of a feed-forward's layers in its module."""

    ins: tuple[str, ...]
    """The Linears that make hidden units; of a gated one two, whose outputs are multiplied."""
    out: str
    norm: str | None = None
    """A norm of the hidden units."""


@dataclass(frozen=True)
class Ffn:
    """One feed-forward that may be cut: Linears of the module `parent`."""

    tower: str
    name: str
    """The path of the module that holds its Linears."""
    block: str
    """The path of the block that it belongs to."""
    parent: nn.Module
    names: FfnNames
    tokens: int

    @property
    def linears_in(self) -> tuple[nn.Linear, ...]:
        return tuple(getattr(self.parent, name) for name in self.names.ins)

    @property
    def linear_in(self) -> nn.Linear:
        return self.linears_in[0]

    @property
    def linear_out(self) -> nn.Linear:
        return getattr(self.parent, self.names.out)

    @property
    def norm(self) -> Norm | None:
        """The norm of the hidden units, if there is one."""
        norm = getattr(self.parent, self.names.norm) if self.names.norm else None
        return norm if is_known_norm(norm) else None

    @property
    def width(self) -> int:
        return self.linear_in.in_features

    @property
    def hidden(self) -> int:
        return self.linear_in.out_features

    @property
    def shape(self) -> dict[str, Any]:
        """Sizes that the architecture no longer determines once this part has been cut."""
        return {"ffn": self.hidden}


Part = Attn | Ffn


def cost_name(part: Part, kind: str) -> str:
    """Return the name that a table of costs has for units of a kind: those of cross-attentions cost other than a tower's own."""
    return f"{CROSS}_{kind}" if isinstance(part, Attn) and part.is_cross else kind


PLAIN = FfnNames(("c_fc",), "c_proj")
BARE = FfnNames(("fc1",), "fc2")
GATED = FfnNames(("c_fc", "c_gate"), "c_proj")  # mT5's


@dataclass(frozen=True)
class Block:
    """One block of a tower: `name` is its module path, `tokens` its sequence length."""

    tower: str
    name: str
    module: nn.Module
    tokens: int
    ffn: FfnNames = PLAIN
    rotary: bool = False
    """Whether its attention is passed rotary positions."""
    memory: int = 0
    """How many tokens its cross-attentions read."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of this block that may be cut: attentions, if it has any, and the feed-forward."""
        attns = {"attn": self.tokens} if self.attends else {}
        attns |= {f"{CROSS}.{number}": self.memory for number in range(len(getattr(self.module, CROSS, ())))}
        found = [
            Attn(self.tower, f"{self.name}.{path}", self.name, self.module.get_submodule(path), self.tokens, memory)
            for path, memory in attns.items()
        ]
        holder, at = self._ffn_holder
        return *found, Ffn(self.tower, at, self.name, holder, self.ffn, self.tokens)

    @property
    def _ffn_holder(self) -> tuple[nn.Module, str]:
        """The module that holds the Linears of the feed-forward, which may be the block itself, and its path."""
        mlp = getattr(self.module, "mlp", None)
        return (self.module, self.name) if mlp is None else (mlp, f"{self.name}.mlp")

    @property
    def attends(self) -> bool:
        """Whether this is a transformer block; one of ConvNeXt convolves instead."""
        return hasattr(self.module, "attn")

    @property
    def is_residual(self) -> bool:
        """Whether its parts write into a stream [B, tokens, width] as they are, scaled at most.

        EVA02-E, BERT and BLIP's text modules have norms behind their parts, and ConvNeXt's stream changes its shape between stages.
        """
        norms_first = getattr(self.module, "norm_first", "PostNorm" not in type(self.module).__name__)
        return self.attends and norms_first

    @property
    def width(self) -> int:
        return self.parts[-1].width

    def gain(self, part: Part) -> nn.Parameter | None:
        """Return the layer scale [width] of a part's branch, or None if it is added to the residual stream as it is."""
        number = 1 if isinstance(part, Attn) else 2
        scales = [getattr(self.module, name, None) for name in (f"ls_{number}", f"ls{number}")]
        found = next((scale.gamma for scale in scales if hasattr(scale, "gamma")), None)
        return getattr(self.module, f"gamma_{number}", None) if found is None else found
