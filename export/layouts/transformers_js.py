"""The folder that transformers.js and optimum read: ONNX files in onnx/, and the JSON files beside them.

    onnx/vision_model.onnx   pixel_values -> image_embeds
    onnx/text_model.onnx     input_ids -> text_embeds
    onnx/model.onnx          both, -> logits_per_image, logits_per_text too: where the export has a joint file
    config.json, preprocessor_config.json, tokenizer.json, tokenizer_config.json, special_tokens_map.json

The names end in what transformers.js's `dtype` looks for: `_quantized` (q8) where a file is INT8, `_fp16` where it is in
float16. The config says which is there, for where no dtype is given. Embeddings have unit length, where optimum's own
exports leave that to the caller: cosines are the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnx import ModelProto, TensorProto, helper

from clipress.export import merge, onnx_file
from clipress.export.extra_models import files_of
from clipress.export.layouts import LAYOUTS, LayoutJob
from clipress.export.layouts.hub_files import image_processor, write_json
from clipress.export.layouts.tokenizer_files import write_tokenizer
from clipress.runtime.export_folder import Exported
from clipress.runtime.served import IMAGE, TEXT

NAMES = {IMAGE: "vision_model", TEXT: "text_model", "joint": "model"}
ENDINGS = {"fp32": "", "int8": "_quantized", "fp16": "_fp16"}
DTYPES = {"fp32": "fp32", "int8": "q8"}


@LAYOUTS.register("transformers.js")
def write(job: LayoutJob, folder: Path) -> None:
    """Write the export's files under transformers.js's names, and what it needs to feed them."""
    exported = job.clip("transformers.js")
    # Pipelines take sigmoids of a SigLIP, not a softmax. Its processor does not crop: what is cropped goes out as a CLIP.
    is_siglip = exported.logit_bias is not None and exported.preprocess.resize_mode == "squash"
    kind = "Siglip" if is_siglip else "CLIP"
    write_tokenizer(exported, folder)
    write_json(folder / "preprocessor_config.json", image_processor(exported.preprocess))
    (folder / "onnx").mkdir()
    apart = {}
    for (name, precision), path in files_of(exported).items():
        if precision in ENDINGS:
            target = folder / "onnx" / f"{NAMES[name]}{ENDINGS[precision]}.onnx"
            if _put(path, target, name == "joint"):
                apart[target.name] = 1
    write_json(folder / "config.json", _config(exported, kind, apart))


def _config(exported: Exported, kind: str, apart: dict[str, int]) -> dict[str, Any]:
    """Return config.json; `apart` has the number of files with weights beside each ONNX file that has them."""
    shared, model = {"projection_dim": exported.embed_dim}, kind.lower()
    return {
        "model_type": model,
        "architectures": [f"{kind}Model"],
        **shared,
        "text_config": {
            "model_type": f"{model}_text_model",
            "max_position_embeddings": exported.tokenizer.context_length,
            **shared,
        },
        "vision_config": {
            "model_type": f"{model}_vision_model",
            "image_size": exported.preprocess.size,
            **shared,
        },
        "transformers.js_config": {
            "dtype": DTYPES[exported.precision],
            **({"use_external_data_format": apart} if apart else {}),
        },
    }


def _put(source: Path, target: Path, is_joint: bool) -> bool:
    """Copy a file; return whether its weights lie beside it, in `<name>.onnx_data`, where transformers.js looks."""
    model = onnx_file.read(source)
    if is_joint:
        _add_logits_per_text(model)
    onnx_file.write(model, target, data=f"{target.name}_data")
    return onnx_file.is_large(model)


def _add_logits_per_text(model: ModelProto) -> None:
    """Add the transposed logits to a joint graph, in place, which optimum reads too."""
    (images,) = (output for output in model.graph.output if output.name == merge.LOGITS)
    sizes = [size.dim_param for size in images.type.tensor_type.shape.dim]
    name = merge.LOGITS.replace("image", "text")
    model.graph.node.append(helper.make_node("Transpose", [merge.LOGITS], [name], name=name, perm=[1, 0]))
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes[::-1]))
