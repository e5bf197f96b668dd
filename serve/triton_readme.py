"""README.md beside a repository's models: how to start the server, send requests to each model, and roll back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from string import Template

from clipress.data.packed_tokenizer import is_packed
from clipress.data.vocabulary import is_reducible
from clipress.runtime.export_folder import Exported, Tokenizer
from clipress.runtime.graph import Graph
from clipress.runtime.served import model_of
from clipress.serve.engines import Engines
from clipress.serve.graphs import (
    IMAGE,
    PREPARED_BY,
    TEXT,
    chain_of,
    classifier_graph,
    inputs_for,
    is_whole,
    is_zero_shot,
    own_graphs,
    segmenter_graph,
    sent_for,
    use_in_words,
    use_of,
)
from clipress.serve.triton_blip import PROGRAMS, blip_row
from clipress.serve.triton_parts import Served

README = Template("""\
# Triton model repository: stage $stage ($precision), $backend backend, version $version

Lineage `$hash`. $about $rows

| model | takes | gives |
|---|---|---|
$models

$batches An input that cannot be read is an error of its request alone.

## Start the server

Models in Python need clipress in the container, and NumPy below 2: with a newer one the
python backend of this release answers with empty tensors and no error. Build such an image once, in a checkout of clipress:

```sh
docker build -t clipress-triton:$tag -f - . <<'END'
FROM nvcr.io/nvidia/tritonserver:$tag-py3
RUN pip install 'numpy<2' onnxruntime $packages
COPY . /opt/clipress
RUN pip install --no-deps /opt/clipress
END
```

Then, in this folder:

```sh
$docker
```
$note
Or without a container, where a server is installed: `clipress triton RUN`.

The server is ready when `curl -sf localhost:8000/v2/health/ready` succeeds. Triton reports ready even after a model's process
has been killed, and then fails that model's requests: let a health check send a request to `$checked` too.
`clipress triton RUN` loads such a model again. The folder above this one is mounted, so that the running server sees a
version that is added: with `--model-control-mode=poll` it loads it by itself, otherwise after a restart.

## Send requests

$with_curl

```sh
$curls
```
$program
## Versions

Each `clipress serve RUN` of a changed export adds a version to every model. Older ones stay, and the newest is served.
To roll back, and forward again:

```sh
clipress serve RUN --roll-back
clipress serve RUN --version $version
```
""")

CHECKSUMS = """
The server compares the files of every model that it loads with their MD5, by the container's repository agent `checksum`: a
model with a changed or missing file is not served. To compare the files of all versions without a server, in this folder:
`md5sum --check --quiet MD5SUMS`.
"""
WITH_CURL = "With curl; `Inference-Header-Content-Length: 0` says that the body is the only input:"
FILES = Template("""\
curl -s localhost:8000/v2/models/$model/infer -H 'Inference-Header-Content-Length: 0' \\
  -H 'Content-Type: application/octet-stream' --data-binary @cat.jpg -o answer.bin""")
DATA = Template("""\
curl -s localhost:8000/v2/models/$model/infer \\
  -d '{"inputs": [{"name": "$name", "shape": $shape, "datatype": "$kind", "data": [$data]}]}'""")
CONFIG = "curl -s localhost:8000/v2/models/{}/config"

PROGRAM = Template("""
$title (`pip install 'tritonclient[grpc]'`):

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
$request
```
$others""")
OTHERS = """
The other models take requests in the same way: `client.infer(MODEL, [tensor])` with a tensor of shape [rows, 1].
"""
ZERO_SHOT = """\
path, *labels = sys.argv[1:]
image = column("image", [pathlib.Path(path).read_bytes()])
names = column("labels", [label.encode() for label in labels])
answer = client.infer("classify", [image, names]).as_numpy("probabilities")[0]
for label, share in zip(labels, answer):
    print(f"{label} {share:.1%}")"""
CLASSIFIER = """\
image = column("image", [pathlib.Path(sys.argv[1]).read_bytes()])
answer = client.infer("classify", [image])
shares, labels = answer.as_numpy("probabilities")[0], answer.as_numpy("labels")
for number in np.argsort(-shares)[:5]:
    print(f"{labels[number].decode()} {shares[number]:.1%}")"""
SEGMENTER = """\
image = column("image", [pathlib.Path(sys.argv[1]).read_bytes()])
answer = client.infer("segment", [image])
mask, labels = answer.as_numpy("mask"), answer.as_numpy("labels")
for number in np.unique(mask):
    print(f"{labels[number].decode()} {(mask == number).mean():.1%}")"""

SENDS = {IMAGE: "`image` BYTES [1]: a JPEG, PNG or WebP file", TEXT: "`text` BYTES [1]: UTF-8"}
TRITON = {"float32": "FP32", "int64": "INT64"}


def readme(served: Served, version: int, with_search: bool, options: Sequence[str]) -> str:
    """Return the README.md of one version of a repository; `options` are those that its server needs."""
    exported, settings = served.exported, served.settings
    engines = next(iter(served.engines.values()), None)
    chains = [name for graph in served.graphs if (name := chain_of(exported, graph))]
    return README.substitute(
        stage=exported.stage,
        precision=exported.precision,
        backend=served.backend,
        version=version,
        hash=exported.lineage_hash,
        about=_about(exported),
        rows=_rows(served),
        models="\n".join(f"| {' | '.join(row)} |" for row in _models(exported, with_search)),
        batches=_batches(exported, with_search),
        checked=[*(model_of(graph) for graph in served.graphs), *chains, *filter(None, [use_of(exported)])][-1],
        tag=settings.container,
        packages=_packages(exported.tokenizer, with_search),
        docker=_docker(served, engines, options),
        note=_about_engines(engines) + _about_int8(served) + (CHECKSUMS if settings.checksums else ""),
        with_curl="With curl, what the model takes and gives:" if is_whole(exported) else WITH_CURL,
        curls="\n".join(_curls(exported, with_search)),
        program=_program(exported),
    )


def _rows(served: Served) -> str:
    if is_whole(served.exported):
        return "A request may have several rows, which are answered together."
    largest = min(served.largest_batch(graph.name) for graph in served.graphs)
    return f"Requests of up to {largest} rows are\naccepted, and requests that wait at the same time are batched."


def _about(exported: Exported) -> str:
    if classifier_graph(exported) is not None:
        return f"The classifier has {len(exported.labels)} labels."
    if exported.logit_scale is None:
        return f"The model {use_in_words(exported)}."
    return "Embeddings have unit length; cosine times `logit_scale` is the logit."


def _models(exported: Exported, with_search: bool) -> Iterator[tuple[str, str, str]]:
    """Yield the rows of the table: a model, what it takes and what it gives."""
    for graph in own_graphs(exported).values():
        takes = [f"`{one.name}` {TRITON[one.dtype]} {list(one.shape)}" for one in graph.inputs]
        gives = [f"`{one.name}` FP32 {list(one.shape)}" for one in graph.outputs]
        yield f"`{model_of(graph)}`", ", ".join(takes), ", ".join(gives)
    for sent, model in PREPARED_BY.items():
        if inputs := inputs_for(exported, sent):
            yield f"`{model}`", SENDS[sent], f"`{next(iter(inputs.values())).name}`"
    for graph in own_graphs(exported).values():
        if name := chain_of(exported, graph):
            yield f"`{name}`", _names(sent_for(exported, one) or one.name for one in graph.inputs), _outputs(graph)
    if is_zero_shot(exported):
        takes = "`image` BYTES [N], `labels` BYTES [C], `templates` BYTES [T] (optional; with {} for the label), `softmax` BOOL [1] (optional)"
        yield "`classify`", takes, "`probabilities` FP32 [N, C]"
    elif classifier_graph(exported) is not None:
        count = len(exported.labels)
        yield "`classify`", "`image` BYTES [N]", f"`probabilities` FP32 [N, {count}], `labels` BYTES [{count}]"
    elif segmenter_graph(exported) is not None:
        gives = f"`mask` UINT16 [H, W], places in `labels` BYTES [{len(exported.labels)}]"
        yield "`segment`", "`image` BYTES [1], of any size", gives
    if use_of(exported) is not None:
        yield blip_row(exported)
    if with_search:
        gives = "`scores` FP32 [N, k], `keys` BYTES [N, k], best first"
        yield "`search`", "`text` BYTES [N], `k` INT32 [1] (optional, 10)", gives


def _outputs(graph: Graph) -> str:
    return _names(one.name for one in graph.outputs)


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _batches(exported: Exported, with_search: bool) -> str:
    """List the models that take lists of any length instead of a batch."""
    has_classify = is_zero_shot(exported) or classifier_graph(exported) is not None
    lists = ["`classify`"] * has_classify + ["`search`"] * with_search
    lists += ["`segment`"] * (segmenter_graph(exported) is not None)
    if (use := use_of(exported)) is not None:
        lists.append(f"`{use}`")
    if is_whole(exported):
        return f"{lists[0]} takes lists of any length."
    return f"All{' but ' + ' and '.join(lists) if lists else ''} take a batch dimension in front."


def _curls(exported: Exported, with_search: bool) -> Iterator[str]:
    """Yield a command for each kind of request."""
    cat = '"a photo of a cat"'
    for sent, model in PREPARED_BY.items():
        graphs = [exported.graphs[name] for name in inputs_for(exported, sent)]
        alone = [graph for graph in graphs if len(graph.inputs) == 1]
        for name in [*(chain_of(exported, graph) for graph in alone), *([model] if graphs else [])]:
            if sent == IMAGE:
                yield FILES.substitute(model=name)
            else:
                yield DATA.substitute(model=name, name=sent, shape="[1, 1]", kind="BYTES", data=cat)
        for graph in alone if sent == TEXT else ():
            (one,) = graph.inputs
            yield DATA.substitute(
                model=model_of(graph),
                name=one.name,
                shape=[1, *one.shape],
                kind=TRITON[one.dtype],
                data=", ".join(["0"] * one.shape[0]),
            )
    yield CONFIG.format(use_of(exported) if is_whole(exported) else model_of(next(iter(exported.graphs.values()))))
    if with_search:
        yield DATA.substitute(model="search", name=TEXT, shape="[1]", kind="BYTES", data=cat)


def _program(exported: Exported) -> str:
    """Return a program that classifies or segments an image; empty where the server does neither."""
    if is_zero_shot(exported):
        title = "An image among labels, as `python classify.py IMAGE LABEL LABEL ...`"
        return PROGRAM.substitute(title=title, request=ZERO_SHOT, others=OTHERS)
    if classifier_graph(exported) is not None:
        return PROGRAM.substitute(
            title="The best labels of an image, as `python classify.py IMAGE`", request=CLASSIFIER, others=OTHERS
        )
    if segmenter_graph(exported) is not None:
        title = "What is where in an image, as `python segment.py IMAGE`"
        return PROGRAM.substitute(title=title, request=SEGMENTER, others=OTHERS)
    if is_whole(exported):
        title, request = PROGRAMS[use_of(exported)]
        return PROGRAM.substitute(title=title, request=request, others="")
    return ""


def _packages(tokenizer: Tokenizer | None, with_search: bool) -> str:
    """Return the packages to install. CLIP's own tokenizer, and one that travels with its model, need no torch."""
    words = ""
    if tokenizer is not None:
        spec = tokenizer.model_dump()
        own = "ftfy tokenizers " if tokenizer.kwargs else "tokenizers "
        other = own if is_packed(spec) else "open_clip_torch transformers "
        words = "ftfy regex tokenizers " if is_reducible(spec) else other
    return f"{words}pillow pydantic pyyaml{' faiss-cpu' if with_search else ''}"


def _docker(served: Served, engines: Engines | None, more: Sequence[str]) -> str:
    options = [f"--model-repository=/models/{served.backend}", *more]
    if engines is not None and engines.version_compatible:
        options.append("--backend-config=tensorrt,version-compatible=true")
    gpus = " --gpus all" if engines is not None else ""
    return (
        f'docker run --rm{gpus} -p 127.0.0.1:8000-8002:8000-8002 -v "$(dirname "$PWD"):/models:ro" --shm-size=1g \\\n'
        f"  clipress-triton:{served.settings.container} tritonserver {' '.join(options)}"
    )


def _about_int8(served: Served) -> str:
    """Return a warning about CPUs on which 8-bit weights overflow."""
    if not served.needs_exact_mode:
        return ""
    return (
        "\nThis model has 8-bit weights, whose products overflow on x86 CPUs without VNNI instructions. The onnxruntime\n"
        "backend has no exact mode, so its answers there would be wrong: serve such CPUs by the python backend, or quantize\n"
        "with portable: true. `clipress export --verify FOLDER` tests an export on the machine it runs on.\n"
    )


def _about_engines(engines: Engines | None) -> str:
    if engines is None:
        return ""
    least = "or a later one" if engines.version_compatible else "exactly"
    return (
        f"\nThe engines were built by TensorRT {engines.tensorrt}; the container must have it {least}: look it up in\n"
        "NVIDIA's support matrix, and set `serve.container` to that release.\n"
    )
