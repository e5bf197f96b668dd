"""SparseGPT (Frantar & Alistarh, arXiv:2301.00774) through nvidia-modelopt, including its weight update.

modelopt 0.47 computes SparseGPT's mask but leaves the remaining weights unchanged, although adjusting them to compensate
for the zeros is half of the method. This module applies the update for that mask.
"""

from __future__ import annotations

from collections.abc import Callable

from modelopt.torch.opt.conversion import apply_mode
from modelopt.torch.sparsity.weight_sparsity.magnitude import MagnitudeSearcher, create_asp_mask
from modelopt.torch.sparsity.weight_sparsity.mode import SparsityModeRegistry
from modelopt.torch.sparsity.weight_sparsity.sparsegpt import SparseGPTSearcher, prepare
from torch import Tensor, nn

DAMP = 0.01  # relative to the mean of the Hessian's diagonal, as in the paper; modelopt's default is 0.1


def sparsify(model: nn.Module, show: Callable[[nn.Module], None]) -> list[str]:
    """Choose 2:4 zeros in place, as modelopt's dynamic modules; `show(model)` runs the calibration samples.

    Convolutions, and Linears that no sample reaches, use magnitude: modelopt's SparseGPT applies the pattern of a
    convolution across kernel positions instead of along the input channels. Returns the names of these layers.
    """
    apply_mode(model, "sparsegpt", registry=SparsityModeRegistry)
    searcher = _Searcher()
    searcher.search(model, {}, (), {"forward_loop": show, "hessian_damp": DAMP})
    return [name for name, module in model.named_modules() if module in searcher.by_magnitude]


class _Searcher(SparseGPTSearcher):
    # TensorRT cannot use every multiple of four, so the stricter check of the magnitude search is used.
    _check_weight_size = MagnitudeSearcher._check_weight_size

    def __init__(self) -> None:
        super().__init__()
        self.by_magnitude: set[nn.Module] = set()

    @classmethod
    def _hook_compute_hessian(cls, mod: nn.Module, inp: tuple[Tensor, ...], out: Tensor) -> None:
        if isinstance(mod, nn.Linear) and mod.weight.numel():  # what has been cut whole has no weights
            rows = inp[0].detach().reshape(len(inp[0]), -1, inp[0].shape[-1])  # there may be more axes in between
            super()._hook_compute_hessian(mod, rows, out)

    def _compute_mask(self, module: nn.Module) -> Tensor:
        if not module.samples:
            self.by_magnitude.add(module)
            return create_asp_mask(module.weight, self.config["pattern"])
        hessian = module.hessian.clone()  # the search damps the original in place
        keep = super()._compute_mask(module)
        weight, root = prepare(module.weight, hessian, self.config["hessian_damp"])
        module._parameters["weight"].copy_(compensated(weight, keep, root))  # `module.weight` is a masked copy
        return keep


def compensated(weight: Tensor, keep: Tensor, root: Tensor) -> Tensor:
    """Zero a weight [R, C] where `keep` is false, and adjust the rest to minimize the change of the output.

    `root` is the upper Cholesky factor of the inverse Hessian [C, C]. Column by column, the error of the zeros is
    distributed over the columns to the right (algorithm 1 of the paper).
    """
    weight = weight.float().clone()
    for column in range(weight.shape[1]):
        lost = weight[:, column].masked_fill(keep[:, column], 0) / root[column, column]
        weight[:, column:] -= lost[:, None] * root[column, column:]
    return weight * keep
