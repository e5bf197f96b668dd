"""SparseGPT (Frantar & Alistarh, arXiv:2301.00774) through nvidia-modelopt, with the update that its search leaves out.

modelopt 0.47 finds SparseGPT's zeros but returns only the mask: the remaining weights stay unchanged, although adjusting
them to compensate for the zeros is half of the method. The method's steps are repeated here for that mask.
"""

from __future__ import annotations

from collections.abc import Callable

from modelopt.torch.opt.conversion import apply_mode
from modelopt.torch.sparsity.weight_sparsity.magnitude import MagnitudeSearcher, create_asp_mask
from modelopt.torch.sparsity.weight_sparsity.mode import SparsityModeRegistry
from modelopt.torch.sparsity.weight_sparsity.sparsegpt import SparseGPTSearcher, prepare
from torch import Tensor, nn

DAMP = 0.01  # of the Hessian's mean diagonal, as in the paper; modelopt's own is 0.1


def sparsify(model: nn.Module, show: Callable[[nn.Module], None]) -> list[str]:
    """Choose 2:4 zeros in place, as modelopt's dynamic modules; `show(model)` runs the calibration samples.

    Convolutions and Linears that no sample reaches use magnitude: modelopt's SparseGPT lays the pattern of a convolution
    across kernel positions instead of along the input channels. Returns the names of these.
    """
    apply_mode(model, "sparsegpt", registry=SparsityModeRegistry)
    searcher = _Searcher()
    searcher.search(model, {}, (), {"forward_loop": show, "hessian_damp": DAMP})
    return [name for name, module in model.named_modules() if module in searcher.by_magnitude]


class _Searcher(SparseGPTSearcher):
    _check_weight_size = (
        MagnitudeSearcher._check_weight_size
    )  # the sizes that TensorRT can use, not all multiples of four

    def __init__(self) -> None:
        super().__init__()
        self.by_magnitude: set[nn.Module] = set()

    @classmethod
    def _hook_compute_hessian(cls, mod: nn.Module, inp: tuple[Tensor, ...], out: Tensor) -> None:
        if isinstance(mod, nn.Linear):  # its input may have more axes between samples and features
            rows = inp[0].detach().reshape(len(inp[0]), -1, inp[0].shape[-1])
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
    """Zero a weight [R, C] where `keep` is false, and adjust the others so that the output changes least.

    `root` is the upper Cholesky factor of the inverse Hessian [C, C]: column by column, the error of a zero is spread over
    the columns to its right (algorithm 1 of the paper).
    """
    weight = weight.float().clone()
    for column in range(weight.shape[1]):
        lost = weight[:, column].masked_fill(keep[:, column], 0) / root[column, column]
        weight[:, column:] -= lost[:, None] * root[column, column:]
    return weight * keep
