"""The page beside a repository's models: how to start the server, ask each model, and roll back."""

from __future__ import annotations

from collections.abc import Sequence
from string import Template

from clipress.data.tokens import CLIP_BPE
from clipress.runtime.export_folder import Tokenizer
from clipress.serve.engines import Plans
from clipress.serve.triton_config import Served

README = Template("""\
# Triton model repository: stage $stage ($precision), $backend backend, version $version

Lineage `$hash`. Embeddings have unit length; cosine times `logit_scale` is the logit. Requests of up to $max_batch rows are
taken, and requests that wait at the same time are batched.

| model | takes | gives |
|---|---|---|
| `image_encoder` | `pixel_values` FP32 [3, $size, $size] | `image_embeds` FP32 [$dim] |
| `text_encoder` | `input_ids` INT64 [$length] | `text_embeds` FP32 [$dim] |
| `preprocess` | `image` BYTES [1]: a JPEG, PNG or WebP file | `pixel_values` |
| `tokenize` | `text` BYTES [1]: UTF-8 | `input_ids` |
| `embed_image` | `image` | `image_embeds` |
| `embed_text` | `text` | `text_embeds` |
| `classify` | `image` BYTES [N], `labels` BYTES [C], `templates` BYTES [T] (optional; with {} for the label) | \
`probabilities` FP32 [N, C] |
$search
All but the last$two_lists take a batch dimension in front. A picture or text that cannot be read is an error of its request alone.

## Start the server

The models around the encoders are Python and need clipress in the container, and NumPy below 2: with a newer one the
python backend of this release answers with empty tensors and no error. Build such an image once, in a checkout of clipress:

```sh
docker build -t clipress-triton:$tag -f - . <<'END'
FROM nvcr.io/nvidia/tritonserver:$tag-py3
RUN pip install 'numpy<2' onnxruntime $tokenizer pillow pydantic pyyaml
COPY . /opt/clipress
RUN pip install --no-deps open_clip_torch /opt/clipress
END
```

Then, in this folder:

```sh
$docker
```
$note
Or, without a container, where a server is installed: `clipress triton RUN`.

Ready when `curl -sf localhost:8000/v2/health/ready` succeeds. Triton still says so when a model's process has been killed, and
then fails that model's requests: let a health check ask `embed_text` too. `clipress triton RUN` loads it again.
The folder above this one is mounted, so that a version that
is added is seen by the running server: `--model-control-mode=poll` loads it by itself, a restart always does.

## Ask it

With curl, a picture's embedding and a text's; `Inference-Header-Content-Length: 0` says that the body is the one input:

```sh
curl -s localhost:8000/v2/models/embed_image/infer -H 'Inference-Header-Content-Length: 0' \\
  -H 'Content-Type: application/octet-stream' --data-binary @cat.jpg -o answer.bin
curl -s localhost:8000/v2/models/preprocess/infer -H 'Inference-Header-Content-Length: 0' \\
  -H 'Content-Type: application/octet-stream' --data-binary @cat.jpg -o answer.bin
curl -s localhost:8000/v2/models/embed_text/infer \\
  -d '{"inputs": [{"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": ["a photo of a cat"]}]}'
curl -s localhost:8000/v2/models/tokenize/infer \\
  -d '{"inputs": [{"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": ["a photo of a cat"]}]}'
curl -s localhost:8000/v2/models/text_encoder/infer \\
  -d '{"inputs": [{"name": "input_ids", "shape": [1, $length], "datatype": "INT64", "data": [$ids]}]}'
curl -s localhost:8000/v2/models/image_encoder/config
$ask_search```

A picture among labels, as `python ask.py PICTURE LABEL LABEL ...` (`pip install 'tritonclient[grpc]'`):

```python
import pathlib
import sys

import numpy as np
import tritonclient.grpc as triton


def column(name, values):
    tensor = triton.InferInput(name, [len(values)], "BYTES")
    tensor.set_data_from_numpy(np.asarray(values, object))
    return tensor


client = triton.InferenceServerClient("localhost:8001")
picture, *labels = sys.argv[1:]
image = column("image", [pathlib.Path(picture).read_bytes()])
names = column("labels", [label.encode() for label in labels])
answer = client.infer("classify", [image, names]).as_numpy("probabilities")[0]
for label, share in zip(labels, answer):
    print(f"{label} {share:.1%}")
```

The other models are asked alike: `client.infer("embed_text", [tensor])` with a tensor of shape [rows, 1].

## Versions

Each `clipress serve RUN` of a changed export adds a version to every model; older ones stay, and the newest is served.
To go back, and to come forward again:

```sh
clipress serve RUN --roll-back
clipress serve RUN --version $version
```
""")

SEARCH = "| `search` | `text` BYTES [N], `k` INT32 [1] (optional, 10) | `scores` FP32 [N, k], `keys` BYTES [N, k], best first |\n"
ASK_SEARCH = """\
curl -s localhost:8000/v2/models/search/infer \\
  -d '{"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a photo of a cat"]}]}'
"""


def readme(served: Served, version: int, with_search: bool, options: Sequence[str]) -> str:
    """Return the page of one version of a repository; `options` are what its server must be told."""
    exported, settings = served.exported, served.settings
    length = exported.tokenizer.context_length
    return README.substitute(
        stage=exported.stage,
        precision=exported.precision,
        backend=served.backend,
        version=version,
        hash=exported.lineage_hash,
        max_batch=served.largest_batch("image"),
        size=exported.preprocess.size,
        dim=exported.embed_dim,
        length=length,
        search=SEARCH if with_search else "",
        two_lists=" two" if with_search else "",
        ask_search=ASK_SEARCH if with_search else "",
        tag=settings.container,
        tokenizer=_tokenizer(exported.tokenizer),
        docker=_docker(served, options),
        note=_note(served.plans.get("image")) + _about_int8(served),
        ids=", ".join(["0"] * length),
    )


def _tokenizer(tokenizer: Tokenizer) -> str:
    """Return the packages it needs: of CLIP's own, open_clip's vocabulary is read, and no torch is needed."""
    plain = tokenizer.name == CLIP_BPE and not tokenizer.kwargs
    return "ftfy regex tokenizers" if plain else "open_clip_torch transformers"


def _docker(served: Served, more: Sequence[str]) -> str:
    settings = served.settings
    options = [f"--model-repository=/models/{served.backend}", *more]
    plans = served.plans.get("image")
    if plans is not None and plans.version_compatible:
        options.append("--backend-config=tensorrt,version-compatible=true")
    gpus = " --gpus all" if plans is not None else ""
    return (
        f'docker run --rm{gpus} -p 127.0.0.1:8000-8002:8000-8002 -v "$(dirname "$PWD"):/models:ro" --shm-size=1g \\\n'
        f"  clipress-triton:{settings.container} tritonserver {' '.join(options)}"
    )


def _about_int8(served: Served) -> str:
    """Return what must be known before 8-bit weights are served on another CPU."""
    if not served.needs_exact_mode:
        return ""
    return (
        "\nThis model has INT8 weights in 8 bits, whose products overflow on x86 CPUs without VNNI instructions. The\n"
        "onnxruntime backend has no exact mode, so its answers there would be wrong: serve such CPUs by the python backend,\n"
        "or quantize with portable: true. `clipress export --verify FOLDER` tests an export on the machine it is on.\n"
    )


def _note(plans: Plans | None) -> str:
    if plans is None:
        return ""
    least = "or a later one" if plans.version_compatible else "exactly"
    return (
        f"\nThe engines were built by TensorRT {plans.tensorrt}; the container must have it {least}: look it up in NVIDIA's\n"
        "support matrix, and set `serve.container` to that release.\n"
    )
