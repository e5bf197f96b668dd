"""INT8 fake quantizers in a model, through nvidia-modelopt. The only file that knows modelopt's quantizer names.

Symmetric int8, weights per output channel, activations per tensor; Linears and Convs only. modelopt's stock INT8 config
silently skips every module called `visual`, which is the whole image tower of an open_clip model. So the rules are written
here, and their result is checked.

x86 CPUs without VNNI instructions add two 8-bit products in 16 bits, which saturates: 2 * 255 * 127 is too large. Weights of
at most `PORTABLE` levels never saturate, in any runtime and however it packs them: 2 * 255 * 64 = 32,640.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from fnmatch import fnmatch
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clipress.errors import ArtifactError, RecipeError

KINDS = (nn.Linear, nn.Conv2d)
LEVELS, PORTABLE = 127, 64  # The largest magnitude of a rounded weight: for int8, and such that every CPU is exact.
Method = Literal["max", "entropy", "percentile"]
Reduce = Callable[[Tensor, Literal["max", "sum"]], Tensor]
"""Combines a tensor over processes."""


def quantizable(model: nn.Module, exclude: tuple[str, ...] = ()) -> list[str]:
    """Return the modules INT8 applies to; modules that match the patterns `exclude` stay in full precision.

    What has been cut whole has no weights left to quantize.
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, KINDS)
        and module.weight.numel()
        and not any(fnmatch(name, pattern) for pattern in exclude)
    ]


def attach(
    model: nn.Module,
    names: list[str],
    calibrate: Callable[[nn.Module], None] | None,
    method: Method = "max",
    percentile: float = 99.9,
    portable: bool = True,
    reduce: Reduce = lambda rows, how: rows,
) -> nn.Module:
    """Put quantizers on the named modules, in place, and calibrate them by running `calibrate(model)`.

    The largest weight of each output channel becomes 127, or 64 if the model is to be `portable`, and training must keep
    weights within that range (`train.HoldRange`). `method` sets the scale of activations: `max`, the largest absolute
    value; `percentile`, the value that so many percent of them stay below; `entropy`, the threshold whose 128 levels lose
    the least information (Migacz, 8-bit inference with TensorRT, GTC 2017). Every process shows its own samples, and all get the scales
    of all samples. Without `calibrate` the scales are still to be loaded.
    """
    import modelopt.torch.quantization as mtq

    if not names:
        raise RecipeError("quantize: 'exclude' leaves no Linear or Conv to quantize. Remove patterns from it.")
    if calibrate:
        _refuse_broken(model)
    _use_torch_linears(model, names)
    _refuse_unknown(model, names)
    calibrator = "max" if method == "max" else "histogram"
    with redirect_stdout(io.StringIO()):  # modelopt prints its counts.
        # modelopt's own algorithm would use a histogram's largest value, so histograms are read here.
        loop = calibrate if method == "max" else None
        mtq.quantize(model, _rules(names, calibrator, "max" if loop else None), forward_loop=loop)
    modules = dict(model.named_modules())
    if calibrate and method != "max":
        _calibrate_by_histogram(model, [modules[name] for name in names], calibrate, method, percentile, reduce)
    elif calibrate:
        for scale in [modules[name].input_quantizer for name in names]:
            if scale.amax is not None:
                scale.amax = reduce(scale.amax, "max")
    if calibrate:
        for problem, affected in _uncalibrated({name: modules[name].input_quantizer for name in names}).items():
            raise RecipeError(
                f"quantize: {problem} {', '.join(affected)}. List them in 'exclude' to keep them in full precision."
            )
    enabled = [n for n in names if modules[n].input_quantizer.is_enabled and modules[n].weight_quantizer.is_enabled]
    if enabled != names:
        raise RuntimeError(f"modelopt left modules unquantized: {sorted(set(names) - set(enabled))}")
    if calibrate and portable:
        for name in names:
            scale = modules[name].weight_quantizer
            scale.amax = scale.amax * (LEVELS / PORTABLE)
    return model


def _rules(names: list[str], calibrator: str, algorithm: str | None) -> dict[str, Any]:
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name in names:
        activations = {"num_bits": 8, "axis": None, "calibrator": calibrator}
        rules.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}})
        rules.append({"quantizer_name": f"{name}.input_quantizer", "cfg": activations})
    return {"quant_cfg": rules, "algorithm": algorithm}


def _refuse_broken(model: nn.Module) -> None:
    broken = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise ArtifactError(
            f"quantize: the model has weights that are not finite: {broken[0]}{more}. INT8 has no scale for them; check "
            "the previous stage or the checkpoint."
        )


def _use_torch_linears(model: nn.Module, names: Iterable[str]) -> None:
    """Turn timm's Linears into torch's, in place: they differ under TorchScript only, and modelopt does not know them."""
    from timm.layers.linear import Linear

    for name in names:
        layer = model.get_submodule(name)
        if type(layer) is Linear:
            layer.__class__ = nn.Linear


def _refuse_unknown(model: nn.Module, names: Iterable[str]) -> None:
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    layers = {name: model.get_submodule(name) for name in names}
    unknown = {name: layer for name, layer in layers.items() if QuantModuleRegistry.get(type(layer)) is None}
    if unknown:
        kinds = sorted({type(layer).__name__ for layer in unknown.values()})
        raise RecipeError(
            f"quantize: nvidia-modelopt has no INT8 form of {' and '.join(kinds)}: {', '.join(unknown)}. List them in "
            "'exclude' to keep them in full precision."
        )


def _calibrate_by_histogram(
    model: nn.Module,
    layers: list[nn.Module],
    calibrate: Callable[[nn.Module], None],
    method: Method,
    percentile: float,
    reduce: Reduce,
) -> None:
    """Set scales by histograms of all samples, whose bins are known beforehand so that those of several processes add up."""
    from modelopt.torch.quantization.model_calib import enable_stats_collection

    largest = _largest_inputs(layers, lambda: calibrate(model), enable=lambda: enable_stats_collection(model))
    for layer, most in zip(layers, largest, strict=True):
        seen, most = layer.input_quantizer._calibrator, reduce(most, "max")
        if most > 0 and most.isfinite():
            seen._calib_hist = torch.zeros(seen._num_bins, device=most.device)
            seen._calib_bin_edges = torch.linspace(0, float(most), seen._num_bins + 1)
    calibrate(model)
    for layer in layers:
        seen = layer.input_quantizer._calibrator
        if seen._calib_hist is not None:
            seen._calib_hist = reduce(seen._calib_hist, "sum")
            # Entropy tries every threshold, in time quadratic in the bins; 256 thresholds are enough.
            how = {"percentile": percentile} if method == "percentile" else {"stride": max(seen._num_bins // 256, 1)}
            layer.input_quantizer.load_calib_amax(method, **how)
            layer.weight_quantizer.load_calib_amax()
            seen.reset()
        for quantizer in (layer.input_quantizer, layer.weight_quantizer):
            quantizer.disable_calib()
            quantizer.enable_quant()
            quantizer.to(layer.weight.device)


@torch.no_grad()
def _largest_inputs(layers: list[nn.Module], calibrate: Callable[[], None], enable: Callable[[], None]) -> list[Tensor]:
    """Return the largest absolute input of every layer, float32 (), and leave the quantizers ready to make histograms."""
    enable()
    found = [torch.zeros((), device=layer.weight.device) for layer in layers]

    def look(at: int) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[at] = torch.maximum(found[at], args[0].detach().abs().max().float())

        return see

    handles = [layer.input_quantizer.register_forward_pre_hook(look(at)) for at, layer in enumerate(layers)]
    for layer in layers:
        layer.input_quantizer.disable_calib()
    calibrate()
    for layer, handle in zip(layers, handles, strict=True):
        handle.remove()
        layer.input_quantizer.enable_calib()
    return found


def _uncalibrated(quantizers: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Group the modules with an unusable scale by the problem."""
    found: dict[str, list[str]] = {}
    for name, quantizer in quantizers.items():
        scale = getattr(quantizer, "amax", None)
        if scale is None:
            found.setdefault("calibration did not reach", []).append(name)
        elif not (torch.isfinite(scale).all() and (scale > 0).all()):
            found.setdefault("calibration passed only zeros, or values that are not finite, to", []).append(name)
    return found


def only(model: nn.Module, names: Iterable[str], rounding: Iterable[str]) -> None:
    """Enable rounding in the modules `rounding` and full precision in the other modules of `names`."""
    rounding = set(rounding)
    for name, quantizer in _quantizers(model, names):
        quantizer.enable() if name in rounding else quantizer.disable()


def detach(model: nn.Module, names: Iterable[str]) -> None:
    """Return modules to full precision for good, as if `exclude` had listed them."""
    for _, quantizer in _quantizers(model, names):
        quantizer.reset_amax()
        quantizer.disable()


def _quantizers(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    modules = dict(model.named_modules())
    for name in names:
        yield name, modules[name].input_quantizer
        yield name, modules[name].weight_quantizer


def restore(model: nn.Module, settings: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    """Put the quantizers of an artifact on a plain model; their scales come from its weights."""
    names = list(settings.get("modules", []))
    modules = dict(model.named_modules())
    unknown = [name for name in names if not isinstance(modules.get(name), KINDS)]
    if unknown or not names:
        raise ArtifactError(f"The artifact quantizes modules the model does not have: {unknown[:3]}.")
    attach(model, names, None)
    for name in names:
        for part in ("input_quantizer", "weight_quantizer"):
            scale = weights.get(f"{name}.{part}._amax")
            if scale is None:
                raise ArtifactError(f"The artifact lacks the INT8 scale of {name} ({part}).")
            getattr(dict(model.named_modules())[name], part).amax = scale
    return model
