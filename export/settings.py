"""The `export` section of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from clipress.recipe import Section

DYNAMO_OPSET = 18  # the least it has; asked for less, it writes this one and only logs that


class OnnxSettings(Section):
    """How ONNX files are made."""

    opset: int = Field(18, ge=17, le=20)
    """The gate holds whichever is asked for against torch."""
    exporter: Literal["auto", "dynamo", "torchscript"] = "auto"
    """auto: dynamo, with torchscript where dynamo cannot (INT8, opset 17) or fails. The graphs run equally fast."""
    int8: Literal["auto", "qdq", "static"] = "auto"
    """Form of a convolutional INT8 image tower: explicit Q/DQ, ONNX Runtime's own, or the quicker of both on this machine.
    TensorRT always gets Q/DQ; transformers always are Q/DQ."""
    labels: tuple[str, ...] | None = None
    """Also write classifier.onnx: pictures -> probabilities of these names."""
    labels_file: Path | None = None
    """The same from a text file, one per line, or `imagenet`."""
    templates: str | tuple[str, ...] = ("a photo of a {}",)
    """Prompts of a label, averaged; `openai` and `simple` name open_clip's lists."""
    joint: bool = False
    """Also write joint.onnx: pictures and texts -> embeddings of both and logits."""
    fp16: bool = False
    """Also write every file in float16, for GPUs: half the size; what is INT8 stays INT8."""

    @model_validator(mode="after")
    def _written_as_asked(self) -> OnnxSettings:
        if self.exporter == "dynamo" and self.opset < DYNAMO_OPSET:
            raise ValueError(f"dynamo writes opset {DYNAMO_OPSET} or later, found {self.opset}: use exporter: auto")
        return self

    @model_validator(mode="after")
    def _one_list(self) -> OnnxSettings:
        if self.labels is not None and self.labels_file is not None:
            raise ValueError("either labels or labels_file is asked for, found both")
        return self

    def of_towers(self) -> dict[str, Any]:
        """Return what the two towers' files depend on."""
        return self.model_dump(include={"opset", "exporter", "int8"})

    @property
    def wants_variants(self) -> bool:
        """Whether files beside the two towers are asked for."""
        return self.joint or self.fp16 or self.labels is not None or self.labels_file is not None


class BatchProfile(Section):
    """An optimisation profile's batch sizes: what an engine takes, and what it is tuned for."""

    min: int = Field(1, ge=1)
    opt: int = Field(8, ge=1)
    max: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> BatchProfile:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"min <= opt <= max is asked for, found {self.min}, {self.opt}, {self.max}")
        return self


class TensorRTSettings(Section):
    """How TensorRT engines are built. The words are trtexec's."""

    precision: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Of everything that is not INT8 in the artefact; fp32 is TF32 where the GPU has it."""
    batch: BatchProfile = BatchProfile()
    """Texts always have the model's context length, pictures its size."""
    sparse_weights: bool = True
    """Weights that are 2:4 may run on sparse kernels where these are faster; others are not touched."""
    optimization_level: int = Field(3, ge=0, le=5)
    """More tries kernels longer."""
    workspace_mib: int | None = Field(None, ge=1)
    """Scratch memory a layer may use; absent: all of the GPU's."""
    version_compatible: bool = False
    """Run on later releases of TensorRT too; slower."""
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    """Run on other GPUs too; slower."""
    timing_cache: Path | None = None
    """What kernels took, so that the next build is quick; absent: a file of this GPU and release in the user's cache."""


class ExportSettings(Section):
    """Everything `clipress export` can be told."""

    onnx: OnnxSettings = OnnxSettings()
    tensorrt: TensorRTSettings | None = None
    """Absent: no engines, unless `clipress export --tensorrt` asks for them."""
