"""The `export` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from clipress.recipe import Section


class OnnxSettings(Section):
    """How ONNX files are made."""

    opset: int = Field(18, ge=17, le=20)
    exporter: Literal["auto", "dynamo", "torchscript"] = "auto"
    """auto: dynamo, with torchscript where dynamo cannot (INT8) or fails. The graphs run equally fast."""


class ExportSettings(Section):
    """Everything `clipress export` can be told."""

    onnx: OnnxSettings = OnnxSettings()
