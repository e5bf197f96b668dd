"""Export folder -> Triton model repositories, one per backend.

    <target>/<backend>/README.md                         how to start it and ask it
    <target>/<backend>/image_encoder/config.pbtxt        pixel_values f32 [3, S, S] -> image_embeds f32 [D]
    <target>/<backend>/image_encoder/1/model.onnx        and model.py, for the python backend
    <target>/<backend>/text_encoder/...                  input_ids i64 [L] -> text_embeds f32 [D]

Configurations are filled into Triton's own protobuf and printed from it, so that no field can be misspelt. Their
`parameters` carry preprocessing, tokenizer and logit scale: a client needs nothing but the server's address.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from clipress.artifact import write_whole
from clipress.errors import ExportError
from clipress.models.exported import Exported, read_export
from clipress.serve.settings import ServeSettings

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

PYTHON_MODEL = Path(__file__).with_name("python_model.py.txt")
TAG = "24.10"  # of the server's container: release 2.51


def triton_repo_from_export(export: Path, target: Path, settings: ServeSettings) -> list[Path]:
    """Write a model repository per backend into `target`; each is replaced only when the new one is whole.

    Returns the repositories' folders. Raises ArtifactError when the export is missing, damaged or changed, and
    ExportError when a configuration does not read back as it was written.
    """
    exported = read_export(export)
    return [_write(exported, target / backend, backend, settings) for backend in dict.fromkeys(settings.backend)]


def _write(exported: Exported, repository: Path, backend: str, settings: ServeSettings) -> Path:
    def fill(aside: Path) -> None:
        for tower in exported.files:
            config = model_config(exported, tower, backend, settings)
            version = aside / config.name / "1"
            version.mkdir(parents=True)
            (version.parent / "config.pbtxt").write_text(config_text(config), encoding="utf-8")
            shutil.copyfile(exported.onnx(tower), version / "model.onnx")
            if backend == "python":
                shutil.copyfile(PYTHON_MODEL, version / "model.py")
        (aside / "README.md").write_text(_readme(exported, backend, settings), encoding="utf-8")

    write_whole(repository, fill)
    return repository


def model_config(exported: Exported, tower: str, backend: str, settings: ServeSettings) -> ModelConfig:
    """Describe one encoder to Triton. Shapes are without the batch, which `max_batch_size` stands for."""
    from tritonclient.grpc import model_config_pb2 as triton

    size, length = exported.preprocess.size, exported.tokenizer.context_length
    takes, type_, dims, sample = {  # random ids would exceed the vocabulary
        "image": ("pixel_values", triton.TYPE_FP32, [3, size, size], {"random_data": True}),
        "text": ("input_ids", triton.TYPE_INT64, [length], {"zero_data": True}),
    }[tower]
    config = triton.ModelConfig(name=f"{tower}_encoder", backend=backend, max_batch_size=settings.max_batch)
    config.input.add(name=takes, data_type=type_, dims=dims)
    config.output.add(name=f"{tower}_embeds", data_type=triton.TYPE_FP32, dims=[exported.embed_dim])
    config.version_policy.latest.num_versions = 1
    config.instance_group.add(kind=triton.ModelInstanceGroup.KIND_CPU, count=settings.instances)
    config.dynamic_batching.SetInParent()  # being there, even empty, is what switches it on
    config.dynamic_batching.max_queue_delay_microseconds = settings.queue_delay_us
    for batch in sorted({1, settings.max_batch}):  # before the first client, at both ends of memory use
        warm_up = config.model_warmup.add(name=f"batch_{batch}", batch_size=batch)
        warm_up.inputs[takes].CopyFrom(triton.ModelWarmup.Input(data_type=type_, dims=dims, **sample))
    parameters = {
        "logit_scale": repr(exported.logit_scale),
        "lineage_hash": exported.lineage_hash,
        "precision": exported.precision,
        "preprocess": exported.preprocess.model_dump_json(),
        "tokenizer": exported.tokenizer.model_dump_json(),
        "intra_op_thread_count": str(settings.threads),  # the onnxruntime backend knows this one; model.py reads it too
    }
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    return config


def config_text(config: ModelConfig) -> str:
    """Print a configuration the way Triton reads it. Raises ExportError when it does not read back the same."""
    from google.protobuf import text_format

    text = text_format.MessageToString(config)
    try:
        same = text_format.Parse(text, type(config)()) == config
    except text_format.ParseError as error:
        raise ExportError(f"{config.name}: the config.pbtxt that was made cannot be read back: {error}.") from error
    if not same:
        raise ExportError(f"{config.name}: the config.pbtxt that was made reads back as another configuration.")
    return text


README = Template("""\
# Triton model repository: stage $stage ($precision), $backend backend

`image_encoder` and `text_encoder` return unit-length embeddings; cosine times `logit_scale` is the logit. Requests of up
to $max_batch rows are taken, and requests that wait at the same time are batched. Lineage: `$hash`.

## Start the server

In this folder:

```sh
$docker
```
$note
Ready when `curl -sf localhost:8000/v2/health/ready` succeeds.

## Ask it

What a model takes, gives and wants its input prepared by:

```sh
curl -s localhost:8000/v2/models/image_encoder/config
```

A text of padding only, to see an answer:

```sh
curl -s localhost:8000/v2/models/text_encoder/infer \\
  -d '{"inputs": [{"name": "input_ids", "shape": [1, $length], "datatype": "INT64", "data": [$ids]}]}'
```

A picture among labels, as `python ask.py PICTURE LABEL LABEL ...`, with clipress installed:

```python
import json
import sys

import numpy as np
import tritonclient.grpc as triton
from clipress.data.tokens import tokenizer_from_spec
from clipress.data.transforms import Preprocess, fitted, normalised, open_image

client = triton.InferenceServerClient("localhost:8001")
kept = {key: value.string_value for key, value in client.get_model_config("image_encoder").config.parameters.items()}
preprocess = Preprocess(**json.loads(kept["preprocess"]))
tokenize = tokenizer_from_spec(json.loads(kept["tokenizer"]))


def embeddings(tower, takes, kind, rows):
    tensor = triton.InferInput(takes, list(rows.shape), kind)
    tensor.set_data_from_numpy(rows)
    return client.infer(f"{tower}_encoder", [tensor]).as_numpy(f"{tower}_embeds")


picture, *labels = sys.argv[1:]
pixels = normalised(fitted(open_image(picture), preprocess), preprocess)[None]
image = embeddings("image", "pixel_values", "FP32", pixels)
texts = embeddings("text", "input_ids", "INT64", tokenize([f"a photo of a {label}" for label in labels]))
logits = float(kept["logit_scale"]) * (image @ texts.T)[0]
odds = np.exp(logits - logits.max())
for label, share in zip(labels, odds / odds.sum()):
    print(f"{label} {share:.1%}")
```
""")

DOCKER = (
    'docker run --rm -p 127.0.0.1:8000-8002:8000-8002 -v "$PWD:/models:ro" --shm-size=1g \\\n'
    "  nvcr.io/nvidia/tritonserver:{tag}-py3 {command}"
)
COMMAND = "tritonserver --model-repository=/models"
PYTHON_NOTE = """
The container's Python has no ONNX Runtime, so it is installed first; build an image that has it for real use. Under
NumPy 2 the python backend of this release answers with empty tensors and no error, hence the older one.
"""


def _readme(exported: Exported, backend: str, settings: ServeSettings) -> str:
    python = backend == "python"
    command = f"bash -c \"pip install onnxruntime 'numpy<2' && exec {COMMAND}\"" if python else COMMAND
    length = exported.tokenizer.context_length
    return README.substitute(
        stage=exported.stage,
        precision=exported.precision,
        backend=backend,
        max_batch=settings.max_batch,
        hash=exported.lineage_hash,
        docker=DOCKER.format(tag=TAG, command=command),
        note=PYTHON_NOTE if python else "",
        length=length,
        ids=", ".join(["0"] * length),
    )
