"""Channel pruning of convolutional image towers, in one cut at the end of a search.

torch-pruning's dependency graph finds the channels that must be cut together: tensors that are added or multiplied share
their channels, and a depthwise convolution passes them on. Such a set is a site. The gradient of a gate on a channel equals
the sum of weight * gradient over all weights that read the channel, so the criteria need neither gates nor a second backward
pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clipress.compress.fabric import full_tensor
from clipress.compress.hook import Hook
from clipress.compress.prune.budget import Target, least_width
from clipress.compress.prune.criterion import CRITERIA
from clipress.errors import ClipressError, RecipeError, first_line
from clipress.models import anatomy
from clipress.models.convnets import is_depthwise, layers
from clipress.models.flops import counting_flops

if TYPE_CHECKING:
    from torch_pruning.dependency import Group

# Operations that do not mix channels. Channels that reach any other operation (a reshape, a matrix product, a concatenation,
# the end of the features) are not cut.
CHANNELWISE = {
    "Add", "Mul", "Clone", "ToCopy", "Relu", "LeakyRelu", "Silu", "Gelu", "Mish", "Hardswish", "Hardsigmoid", "Hardtanh",
    "Sigmoid", "Mean", "AvgPool2D", "AdaptiveAvgPool2D", "MaxPool2DWithIndices", "ConstantPadNd", "NativeBatchNorm",
    "CudnnBatchNorm", "MiopenBatchNorm",
}  # fmt: skip


@dataclass(frozen=True)
class Channels:
    """A set of channels that are cut together; `name` is one of the layers that produce them."""

    name: str
    count: int
    made_by: tuple[str, ...]
    """Convolutions, including depthwise ones, and norms that lose output rows."""
    read_by: tuple[str, ...]
    """Convolutions that lose input columns."""


@dataclass(frozen=True)
class Costs:
    """The exact cost of a tower as a function of its sites' widths: fixed + sum of factor * product of widths."""

    total: int
    widths: list[int]
    """Widths of the uncut sites."""
    terms: list[tuple[int, tuple[int, ...]]]
    """(factor, sites); a convolution between two sites has both."""

    @cached_property
    def by_site(self) -> list[list[tuple[int, tuple[int, ...]]]]:
        """The terms that each site appears in."""
        return [[term for term in self.terms if site in term[1]] for site in range(len(self.widths))]

    def of(self, widths: Sequence[int]) -> int:
        """Return the tower's cost at these widths."""
        return self.total - _sum(self.terms, self.widths) + _sum(self.terms, widths)

    def saved(self, widths: Sequence[int], site: int, step: int) -> int:
        """Return the cost saved by cutting `step` channels of one site at these widths."""
        after = [*widths]
        after[site] -= step
        return _sum(self.by_site[site], widths) - _sum(self.by_site[site], after)


def _sum(terms: Sequence[tuple[int, tuple[int, ...]]], widths: Sequence[int]) -> int:
    return sum(factor * math.prod(widths[site] for site in sites) for factor, sites in terms)


class ConvPruning(Hook):
    """Accumulate scores while a model trains, then cut its image tower.

    The training loop, or the caller, calls `add` after each backward pass and `cut` at the end. `target` applies to the
    whole image tower. Final widths are multiples of `align`, and every site keeps at least a fraction `min_keep`. Raises
    RecipeError immediately if the budget cannot be met.
    """

    def __init__(
        self, model: nn.Module, criterion: str, target: Target, *, align: int = 8, min_keep: float = 0.1, seed: int = 0
    ) -> None:
        if not CRITERIA[criterion].for_channels:
            usable = [name for name, kind in CRITERIA.items() if kind.for_channels]
            raise RecipeError(
                f"prune.criterion: {criterion} cannot score convolutional image towers. Use one of {', '.join(usable)}."
            )
        if target.unit not in ("params", "macs"):
            raise RecipeError(
                f"prune.budget: expected params or macs for a convolutional image tower, found {target.unit}."
            )
        self.model, self.criterion_name, self.align, self.seed = model, criterion, align, seed
        self.criterion = CRITERIA[criterion]()
        self.sites = [site for site, _ in channel_groups(model)]
        self.costs = tower_costs(model, self.sites, target.unit)
        self.fraction = target.fraction(self.costs.total)
        self.least = [least_width(site.count, min_keep, align, 1) for site in self.sites]
        self._check_budget(target.unit)
        device = next(model.visual.parameters()).device
        self.sums = [torch.zeros(site.count, dtype=torch.float64, device=device) for site in self.sites]
        self.taken_in = self.left_out = 0

    def _check_budget(self, unit: str) -> None:
        smallest = self.costs.of(self.least) / self.costs.total
        if self.fraction < smallest:
            raise RecipeError(
                f"prune.budget: {unit} {self.fraction:.3f} of the image tower cannot be met; with this min_keep and align "
                f"the smallest possible is {smallest:.3f} (the head and the layer it reads stay whole). "
                "Raise the budget or lower 'min_keep' or 'align'."
            )

    def state(self) -> dict[str, Any]:
        return {"sums": self.sums, "taken_in": self.taken_in, "left_out": self.left_out}

    def load_state(self, state: dict[str, Any]) -> None:
        self.sums = [kept.to(total.device) for kept, total in zip(state["sums"], self.sums, strict=True)]
        self.taken_in, self.left_out = state["taken_in"], state["left_out"]

    def after_backward(self, step: int) -> None:
        self.add()

    @torch.no_grad()
    def add(self) -> None:
        """Add the gradients of this micro-batch; a micro-batch with non-finite gradients is skipped and counted."""
        if not self.criterion.uses_gradients:
            return
        found = layers(self.model)
        gradients = [sum(_gate_gradient(found[name]) for name in site.read_by) for site in self.sites]
        if not torch.cat(gradients).isfinite().all():
            self.left_out += 1
            return
        self.taken_in += 1
        for total, gradient in zip(self.sums, gradients, strict=True):
            total += self.criterion.summed(gradient[None])

    @torch.no_grad()
    def scores(self) -> list[Tensor]:
        """Return the channel scores of every site, float64; the largest are kept."""
        if not self.criterion.uses_gradients:
            found, generator = layers(self.model), torch.Generator().manual_seed(self.seed)
            return [self.criterion.score_channels(_channel_weights(site, found), generator) for site in self.sites]
        if not self.taken_in:
            raise ClipressError(
                f"prune: criterion {self.criterion_name} found no finite gradient ({self.left_out} steps skipped). "
                "Use more steps or a lower 'lr'."
            )
        return self.sums

    def cut(self) -> dict[str, Any]:
        """Cut the channels with the lowest score per cost until the budget is met. Returns a record for the lineage."""
        scores = self.scores()
        widths = choose_widths(self.costs, scores, self.fraction * self.costs.total, self.least, self.align)
        groups = dict(channel_groups(self.model))  # trace again, since training may have replaced weights
        for site, score, width in zip(self.sites, scores, widths, strict=True):
            if width < site.count:
                worst = score.argsort(stable=True)[: site.count - width]
                groups[site].prune(sorted(worst.tolist()))
        return {
            "conv_channels": {site.name: [site.count, width] for site, width in zip(self.sites, widths, strict=True)},
            "image_tower_kept": round(self.costs.of(widths) / self.costs.total, 4),
            "micro_batches_left_out": self.left_out,
        }


def choose_widths(costs: Costs, scores: Sequence[Tensor], target: float, least: Sequence[int], align: int) -> list[int]:
    """Return the widths that meet `target`: aligned steps are cut in order of increasing score per cost.

    What a step saves depends on the current widths of its neighbors, so it is recomputed before every cut.
    """
    widths = [*costs.widths]
    worth = [
        [0.0, *score.sort().values.cumsum(0).tolist()] for score in scores
    ]  # [site][n]: sum of the n lowest scores

    def price(site: int) -> float:
        step, gone = _step(widths[site], align), costs.widths[site] - widths[site]
        return (worth[site][gone + step] - worth[site][gone]) / costs.saved(widths, site, step)

    cost = costs.of(widths)
    while cost > target:
        site = min((i for i in range(len(widths)) if widths[i] > least[i]), key=price)
        step = _step(widths[site], align)
        cost -= costs.saved(widths, site, step)
        widths[site] -= step
    return widths


def _step(width: int, align: int) -> int:
    return width % align or align


def _gate_gradient(conv: nn.Conv2d) -> Tensor:
    """Sum weight * gradient per input channel, float64 [in]."""
    if conv.weight.grad is None:
        return torch.zeros(conv.in_channels, dtype=torch.float64, device=conv.weight.device)
    return (full_tensor(conv.weight).double() * full_tensor(conv.weight.grad).double()).sum((0, 2, 3))


def _channel_weights(site: Channels, found: dict[str, nn.Module]) -> Tensor:
    """Return all weights that produce or read each channel: [channels, weights]."""
    made = [p.reshape(site.count, -1) for name in site.made_by for p in found[name].parameters(recurse=False)]
    read = [found[name].weight.transpose(0, 1).reshape(site.count, -1) for name in site.read_by]
    return torch.cat([*made, *read], 1)


def tower_costs(model: nn.Module, sites: Sequence[Channels], unit: str) -> Costs:
    """Return the image tower's cost in `unit`: params, or macs for one image."""
    maker = {name: i for i, site in enumerate(sites) for name in site.made_by}
    reader = {name: i for i, site in enumerate(sites) for name in site.read_by}
    total, positions = _macs(model) if unit == "macs" else (sum(p.numel() for p in model.visual.parameters()), None)
    terms = []
    for name, layer in layers(model).items():
        for parameter in layer.parameters(recurse=False):
            is_kernel = parameter.ndim > 1
            touched = (maker.get(name), reader.get(name) if is_kernel else None)
            touched = tuple(site for site in touched if site is not None)
            uses = 1 if positions is None else positions[name] if is_kernel else 0
            if touched and uses:
                terms.append((uses * parameter.numel() // math.prod(sites[i].count for i in touched), touched))
    return Costs(total, [site.count for site in sites], terms)


def _macs(model: nn.Module) -> tuple[int, dict[str, int]]:
    """Count the image tower's multiply-accumulates for one image, and the output positions of each convolution."""
    positions: dict[str, int] = {}
    handles = [
        layer.register_forward_hook(lambda _, __, out, name=name: positions.update({name: out.shape[2:].numel()}))
        for name, layer in layers(model).items()
    ]
    with _evaluating(model.visual), counting_flops(model.visual) as counter:
        model.visual(_image(model))
    for handle in handles:
        handle.remove()
    return counter.get_total_flops() // 2, positions


def channel_groups(model: nn.Module) -> Iterator[tuple[Channels, Group]]:
    """Yield every site of the image tower with the torch-pruning group that cuts it."""
    from torch_pruning import DependencyGraph

    names = {layer: name for name, layer in layers(model).items()}
    image = _image(model).requires_grad_()  # with this, frozen weights are traced too
    with _evaluating(model.visual), torch.enable_grad():
        try:
            graph = DependencyGraph().build_dependency(model.visual, (image,), forward_fn=_features, verbose=False)
        except Exception as error:  # It can fail anywhere in a tower that it does not expect.
            raise RecipeError(
                f"prune: torch-pruning cannot tell which channels of this image tower belong together ({first_line(error)}). "
                "Leave the tower uncut: give the budget to the other one."
            ) from None
    for group in graph.get_all_groups(root_module_types=(nn.Conv2d,)):
        count = len(group[0].idxs)
        if all(_may_be_cut(dep.target, len(indices), count) for dep, indices in group.items):
            members = [dep for dep, _ in group.items if dep.layer in names]
            made_by = tuple(names[dep.layer] for dep in members if graph.is_out_channel_pruning_fn(dep.handler))
            read_by = tuple(names[dep.layer] for dep in members if not graph.is_out_channel_pruning_fn(dep.handler))
            yield Channels(made_by[0], count, made_by, read_by), group


def _may_be_cut(node: Any, indices: int, count: int) -> bool:
    """Return whether a member of a group can lose channels: it has exactly these, and does not mix them."""
    from torch_pruning.ops import OPTYPE

    layer = node.module
    if isinstance(layer, nn.Conv2d):
        return indices == count and (layer.groups == 1 or is_depthwise(layer))
    if isinstance(layer, nn.BatchNorm2d):
        return indices == count == layer.num_features
    return node.type == OPTYPE.ELEMENTWISE and node.grad_fn.name().split("Backward")[0] in CHANNELWISE


def _features(visual: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Run a tower up to the input of its head. As the output of the traced graph it keeps the width the head expects."""
    (image,) = inputs
    if hasattr(visual, "trunk"):
        features = visual.trunk.forward_features(image)
    else:
        (features,) = visual.forward_intermediates(image, indices=1, intermediates_only=True)["image_intermediates"]
    return features * 1  # a separate operation, so that the last layer itself is not treated as the output


def _image(model: nn.Module) -> Tensor:
    weight = next(model.visual.parameters())
    return torch.zeros(1, 3, *anatomy.image_size(model), device=weight.device, dtype=weight.dtype)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
