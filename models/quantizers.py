"""INT8 fake quantisers in a model, through nvidia-modelopt. The only file that knows modelopt's quantiser names.

Symmetric int8, weights per output channel, activations per tensor; Linears and Convs only. modelopt's stock INT8
config skips every module called `visual`, the whole image tower of an open_clip model, without a word: so the rules are
written here, and what came out is checked.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from fnmatch import fnmatch
from typing import Any

from torch import Tensor, nn

from clipress.errors import ArtifactError, RecipeError

KINDS = (nn.Linear, nn.Conv2d)


def quantizable(model: nn.Module, keep: tuple[str, ...] = ()) -> list[str]:
    """Return the modules INT8 applies to; `keep` are name patterns that stay in full precision."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, KINDS) and not any(fnmatch(name, pattern) for pattern in keep)
    ]


def _rules(names: list[str], algorithm: str | None) -> dict[str, Any]:
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name in names:
        rules.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}})
        rules.append({"quantizer_name": f"{name}.input_quantizer", "cfg": {"num_bits": 8, "axis": None}})
    return {"quant_cfg": rules, "algorithm": algorithm}


def attach(
    model: nn.Module, names: list[str], calibrate: Callable[[nn.Module], None] | None, algorithm: str = "max"
) -> nn.Module:
    """Put quantisers on the named modules, in place, and calibrate them by running `calibrate(model)`.

    Without `calibrate` the scales are still to be loaded.
    """
    import modelopt.torch.quantization as mtq

    if not names:
        raise RecipeError("quantize: no Linear or Conv is left to quantise; 'keep' names them all.")
    with redirect_stdout(io.StringIO()):  # it counts aloud
        mtq.quantize(model, _rules(names, algorithm if calibrate else None), forward_loop=calibrate)
    modules = dict(model.named_modules())
    if calibrate:
        dynamic = [name for name in names if getattr(modules[name].input_quantizer, "amax", None) is None]
        if dynamic:
            raise RecipeError(f"quantize: calibration never reached {', '.join(dynamic)}.")
    switched_on = [n for n in names if modules[n].input_quantizer.is_enabled and modules[n].weight_quantizer.is_enabled]
    if switched_on != names:
        raise RuntimeError(f"modelopt left modules unquantised: {sorted(set(names) - set(switched_on))}")
    return model


def restore(model: nn.Module, settings: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    """Put the quantisers of an artefact on a plain model; their scales come from its weights."""
    names = list(settings.get("modules", []))
    modules = dict(model.named_modules())
    unknown = [name for name in names if not isinstance(modules.get(name), KINDS)]
    if unknown or not names:
        raise ArtifactError(f"The artefact quantises modules the model does not have: {unknown[:3]}.")
    attach(model, names, None)
    for name in names:
        for part in ("input_quantizer", "weight_quantizer"):
            scale = weights.get(f"{name}.{part}._amax")
            if scale is None:
                raise ArtifactError(f"The artefact lacks the INT8 scale of {name} ({part}).")
            getattr(dict(model.named_modules())[name], part).amax = scale
    return model
