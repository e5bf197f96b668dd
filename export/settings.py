"""The `export` section of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, SerializerFunctionWrapHandler, model_serializer, model_validator

from clipress.errors import RecipeError, nearest
from clipress.export.targets import TARGETS
from clipress.recipe import Section, checked

DYNAMO_OPSET = 18  # The oldest that dynamo writes; below it, dynamo writes this one and only logs that.


class OnnxSettings(Section):
    """The section `export.onnx`."""

    opset: int = Field(18, ge=17, le=20)
    """Opset of the ONNX files; every file is compared with torch."""
    exporter: Literal["auto", "dynamo", "torchscript"] = "auto"
    """auto: dynamo, and torchscript where dynamo fails or does not apply (INT8, opset 17). Both run equally fast."""
    int8: Literal["auto", "qdq", "static"] = "auto"
    """Form of a convolutional INT8 graph: explicit Q/DQ, ONNX Runtime's own (static), or the faster of both on this
    machine. TensorRT always reads Q/DQ; transformers always are Q/DQ."""
    labels: tuple[str, ...] | None = None
    """Also write classifier.onnx, which maps images to probabilities of these labels. CLIP only."""
    labels_file: Path | None = None
    """Labels from a text file, one per line, or `imagenet`."""
    templates: str | tuple[str, ...] = ("a photo of a {}",)
    """Prompts of a label, whose embeddings are averaged; `openai` and `simple` are open_clip's lists."""
    softmax: bool = False
    """Let classifier.onnx of a SigLIP give probabilities that sum to 1, as a CLIP's do; default: a sigmoid per label."""
    joint: bool = False
    """Also write joint.onnx, which maps images and texts to embeddings and logits. CLIP only."""
    fp16: bool = False
    """Also write every file in float16 for GPUs, at half the size; INT8 stays INT8."""

    @model_validator(mode="after")
    def _dynamo_writes_the_opset(self) -> OnnxSettings:
        if self.exporter == "dynamo" and self.opset < DYNAMO_OPSET:
            raise ValueError(f"dynamo writes opset {DYNAMO_OPSET} or later, found {self.opset}: use exporter: auto")
        return self

    @model_validator(mode="after")
    def _one_list(self) -> OnnxSettings:
        if self.labels is not None and self.labels_file is not None:
            raise ValueError("expected labels or labels_file, found both")
        return self

    def of_graphs(self) -> dict[str, Any]:
        """Return the settings that determine the graphs' files."""
        return self.model_dump(include={"opset", "exporter", "int8"})

    @property
    def wants_extra_models(self) -> bool:
        """Whether files besides the graphs' are to be written."""
        return self.joint or self.fp16 or self.labels is not None or self.labels_file is not None


class BatchProfile(Section):
    """Batch sizes of an optimization profile: what an engine accepts, and what it is tuned for."""

    min: int = Field(1, ge=1)
    opt: int = Field(8, ge=1)
    max: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> BatchProfile:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"expected min <= opt <= max, found {self.min}, {self.opt}, {self.max}")
        return self


class TensorRTSettings(Section):
    """The section `export.tensorrt`, in trtexec's terms."""

    precision: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Precision of everything that is not INT8 in the artifact; fp32 is TF32 on GPUs that have it."""
    batch: BatchProfile = BatchProfile()
    """Besides the batch only the length of texts varies, up to the model's; it is tuned for captions."""
    sparse_weights: bool = True
    """Allow sparse kernels for 2:4 weights where these are faster."""
    optimization_level: int = Field(3, ge=0, le=5)
    """A higher level searches kernels longer."""
    workspace_mib: int | None = Field(None, ge=1)
    """Scratch memory of a layer; default: all of the GPU's."""
    version_compatible: bool = False
    """Run on later releases of TensorRT too; slower."""
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    """Run on other GPUs too; slower."""
    timing_cache: Path | None = None
    """File of kernel timings that speed up the next build; default: one per GPU and release in the user's cache."""


class ExportSettings(Section):
    """The `export` section: how ONNX files are made, and a section per target that is made from them."""

    onnx: OnnxSettings = OnnxSettings()
    targets: dict[str, SerializeAsAny[Section]] = Field(default_factory=dict)
    """Export targets by name, `export.<name>` in a recipe. Default: none. `clipress export --tensorrt` adds TensorRT."""

    @model_validator(mode="before")
    @classmethod
    def _find_targets(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        names = [name for name in raw if name != "onnx"]
        if unknown := [name for name in names if name not in TARGETS]:
            raise RecipeError(
                f"export.{unknown[0]}: unknown key '{unknown[0]}'.{nearest(str(unknown[0]), ['onnx', *TARGETS])}"
            )
        found = {
            name: checked(TARGETS[name].settings, raw[name], f"export.{name}")
            for name in names
            if raw[name] is not None
        }
        return {key: value for key, value in raw.items() if key not in names} | {"targets": found}

    @model_serializer(mode="wrap")
    def _as_in_a_recipe(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped = dump(self)
        targets = dumped.pop("targets", {})
        return dumped | targets

    @property
    def tensorrt(self) -> TensorRTSettings | None:
        """Settings of TensorRT engines; None where the recipe has no such section."""
        return self.targets.get("tensorrt")
