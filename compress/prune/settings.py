"""Settings of the `prune` stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from clipress.compress.context import Context, steps_of
from clipress.compress.losses import Losses, terms_from
from clipress.compress.prune.budget import Align, Budget, MinKeep, check_towers
from clipress.compress.prune.criterion import CRITERIA
from clipress.compress.prune.gates import Kind
from clipress.compress.prune.refit import Refit
from clipress.compress.prune.schedule import SCHEDULES
from clipress.compress.prune.vocabulary import Vocabulary
from clipress.compress.settings import Training
from clipress.errors import RecipeError

Scale = Literal["original", "sqrt_k"]
Biases = Literal["kept", "lost"]


class Prune(Training):
    """Settings of `prune`."""

    budget: Budget | None = None
    """What may remain inside blocks. Optional with `vocabulary`, which alone needs no training."""
    vocabulary: Vocabulary | None = None
    """Shrink the token embedding first."""
    sites: dict[str, tuple[Kind, ...]] = Field(default_factory=dict)
    """What to cut, per tower: any of heads, qk, v, ffn. An empty list leaves a tower uncut. Default: qk, v and ffn."""
    criterion: Annotated[str, AfterValidator(CRITERIA.check)] = "fisher"
    losses: Losses = ("contrastive",)
    """Task losses; scores use their gradients and those of `distill_losses`."""
    distill_losses: Losses = ()
    """Distillation losses to add during the search."""
    steps: int | None = Field(None, ge=0)
    """0 trains nothing: units are scored on `calibrate` items."""
    calibrate: int = Field(1024, ge=2)
    """Number of training items used by `rotate`, and by the scores with `steps: 0`."""
    rotate: bool
    """Turn every head's bases to their principal directions before the search. Default: true, except for `criterion: upop`,
    whose gates are shared by all heads in the basis that the model came with."""
    refit: Refit | Literal[False]
    """Refit what remains to the uncut model in closed form. Default: with `steps: 0` only, since weights that were trained have
    moved away from the uncut model."""
    schedule: Annotated[str, AfterValidator(SCHEDULES.check)] = "cubic"
    update_every: int | None = Field(None, ge=1)
    """Steps between updates of the masks. Default: 10, or a tenth of fewer than 100 steps."""
    final_fraction: float = Field(0.2, ge=0, lt=1)
    """Fraction of the steps, at the end of the search, in which the masks no longer change."""
    align: Align = Align()
    min_keep: MinKeep = MinKeep()
    softmax_scale: Scale | dict[str, Scale] = "original"
    """Divide the logits of a cut attention by the square root of its original width, so that it computes what the masked
    one did, or of its new width, as UPop's code does; for all towers or by tower, as in {text: sqrt_k}, which is its code for BLIP."""
    qkv_biases: Biases | dict[str, Biases] = "kept"
    """Biases of q, k and v are cut along, or lost, as in UPop's code for DeiT and BLIP's image tower, whose new layers keep their
    random ones; for all towers or by tower."""
    lr: float = Field(2e-4, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, raw: Any) -> Any:
        """Fill in the defaults that depend on other settings, so that the settings in force are shown."""
        if not isinstance(raw, Mapping):
            return raw
        filled, criterion = dict(raw), raw.get("criterion", "fisher")
        if filled.get("rotate") is None:
            filled["rotate"] = criterion not in CRITERIA or CRITERIA[criterion].space == "separate"
        if filled.get("refit") is None:
            filled["refit"] = raw.get("steps") == 0
        if filled["refit"] is True:
            filled["refit"] = Refit()
        return filled

    def model_post_init(self, context: Any) -> None:
        if self.budget is None:
            if self.vocabulary is None:
                raise RecipeError("prune: expected a budget, a vocabulary or both, found neither.")
            if self.steps is not None or self.epochs is not None:
                raise RecipeError(
                    "prune: without a budget nothing is trained. Set 'budget', or leave out steps and epochs."
                )
            return
        super().model_post_init(context)
        terms_from(self.losses, "prune.losses")
        terms_from(self.distill_losses, "prune.distill_losses")
        targets = list(self.budget.by_tower.values()) or [self.budget]
        if CRITERIA[self.criterion].space != "upop" and any(target.unit == "upop" for target in targets):
            raise RecipeError("prune.budget: 'upop' requires 'criterion: upop'. Use params, macs or latency.")
        for tower, kinds in self.sites.items():
            if "heads" in kinds and {"qk", "v"} & set(kinds):
                raise RecipeError(
                    f"prune.sites.{tower}: expected either heads, or qk and v, found both. The score and cost of one depend "
                    "on the other. Prune heads and dims in separate stages."
                )

    def in_tower(self, name: str, tower: str) -> str:
        """Return a setting that may be given by tower, in one of them: the default in those that are not named."""
        value = getattr(self, name)
        return value if isinstance(value, str) else value.get(tower, type(self).model_fields[name].default)

    def check_towers(self, towers: Sequence[str]) -> None:
        """Raise RecipeError if a setting names a tower that the model does not have."""
        for name in ("sites", "softmax_scale", "qkv_biases"):
            if isinstance(named := getattr(self, name), Mapping):
                check_towers(named, towers, f"prune.{name}")

    def search_steps(self, context: Context) -> int:
        """Return the number of batches of the search."""
        return -(-self.calibrate // self.batch_size) if self.steps == 0 else steps_of(self, context.data)
