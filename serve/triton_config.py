"""Triton's config.pbtxt of every model, built as Triton's own protobuf and printed from it: no field can be misspelt.

Shapes exclude the batch, which `max_batch_size` stands for. Models whose requests hold lists of several lengths have
`max_batch_size` 0 and dims of -1. `parameters` carry preprocessing, tokenizer, logit scale and labels: clients and the
python models need nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from itertools import product
from typing import TYPE_CHECKING

from clipress.data.padding import CAPTION
from clipress.errors import ExportError
from clipress.runtime.cpu import processor
from clipress.runtime.export_folder import Exported
from clipress.runtime.graph import Graph, Input
from clipress.runtime.onnx_session import EXACT_MODE
from clipress.runtime.served import model_of
from clipress.serve.engines import Engines
from clipress.serve.graphs import (
    IMAGE,
    PREPARED_BY,
    TEXT,
    chain_of,
    classifier_graph,
    inputs_for,
    is_zero_shot,
    segmenter_graph,
    sent_for,
)
from clipress.serve.settings import ServeSettings
from clipress.serve.sizing import helpers
from clipress.serve.triton_blip import blip_config
from clipress.serve.triton_parts import (
    BOOL,
    FP32,
    INT32,
    STRING,
    TYPES,
    UINT16,
    Served,
    add_instances,
    add_outputs,
    add_warm_up,
    batch_requests,
    begin,
    dims_of,
    limit_rate,
    set_parameters,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tritonclient.grpc.model_config_pb2 import ModelConfig

CACHE = "text_cache_mb"  # stored in the configuration because the server needs an option for it


def configs(served: Served, with_search: bool) -> dict[str, ModelConfig]:
    """Return the configuration of every model by its name."""
    exported = served.exported
    made = [_encoder(served, graph) for graph in served.graphs]
    made += [_prepare(served, sent) for sent in PREPARED_BY if inputs_for(exported, sent)]
    for graph in served.graphs:
        if name := chain_of(exported, graph):
            made.append(_fused(served, graph, name) if graph.name in served.fused else _ensemble(served, graph, name))
    if is_zero_shot(exported):
        made.append(_classify_zero_shot(served))
    elif (scores := classifier_graph(exported)) is not None:
        made.append(_classify(served, scores))
    elif (scores := segmenter_graph(exported)) is not None:
        made.append(_segment(served, scores))
    if (config := blip_config(served)) is not None:
        made.append(config)
    if with_search:
        made.append(_search(served))
    for config in made:
        config.parameters["lineage_hash"].string_value = exported.lineage_hash
    return {config.name: config for config in made}


def config_text(config: ModelConfig) -> str:
    """Print a configuration the way Triton reads it. Raises ExportError if it does not read back the same."""
    from google.protobuf import text_format

    text = text_format.MessageToString(config)
    try:
        same = text_format.Parse(text, type(config)()) == config
    except text_format.ParseError as error:
        raise ExportError(f"{config.name}: the generated config.pbtxt cannot be read back: {error}.") from error
    if not same:
        raise ExportError(f"{config.name}: the generated config.pbtxt reads back as another configuration.")
    return text


def config_from(text: str) -> ModelConfig:
    """Read a config.pbtxt. Raises ExportError."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as triton

    try:
        return text_format.Parse(text, triton.ModelConfig())
    except text_format.ParseError as error:
        raise ExportError(f"A config.pbtxt cannot be read: {error}.") from None


def server_options(repository: Path) -> list[str]:
    """Return the options that a server of this repository needs."""
    return options_for([config_from(path.read_text(encoding="utf-8")) for path in repository.glob("*/config.pbtxt")])


def options_for(models: Collection[ModelConfig]) -> list[str]:
    """Return the options that a server of these models needs, for its rate limiter and its cache."""
    limited = any(group.HasField("rate_limiter") for config in models for group in config.instance_group)
    cache = max(
        (int(config.parameters[CACHE].string_value) for config in models if CACHE in config.parameters), default=0
    )
    return [
        *(["--rate-limit=execution_count"] if limited else []),
        *([f"--cache-config=local,size={cache << 20}"] if cache else []),
    ]


def _encoder(served: Served, graph: Graph) -> ModelConfig:
    """Describe the model that runs a graph on its own inputs."""
    exported, settings, size = served.exported, served.settings, served.sizes[graph.name]
    largest = served.largest_batch(graph.name)
    config = begin(model_of(graph), served.backend, largest)
    for one in graph.inputs:
        config.input.add(name=one.name, data_type=TYPES[one.dtype], dims=dims_of(one))
    add_outputs(config, graph.outputs)
    if served.needs_exact_mode:
        _use_exact_mode(config)
    if served.engines:
        _run_on_gpus(config, graph, size.instances, served.engines[graph.name], settings)
    else:
        add_instances(config, size.instances)
    limit_rate(config, settings)
    batch_requests(config, settings)
    if size.preferred_batch is not None and size.preferred_batch < largest:
        config.dynamic_batching.preferred_batch_size.append(size.preferred_batch)
    _cache_texts(config, served, graph)
    samples = {one.name: {"dims": one.shape, "zero_data": True} for one in graph.inputs}  # random numbers may be NaN
    for batch in sorted({1, largest}):  # both ends of memory use, before the first client comes
        add_warm_up(config, f"batch_{batch}", batch, samples)
    set_parameters(
        config,
        logit_scale=None if exported.logit_scale is None else repr(exported.logit_scale),
        precision=exported.precision,
        preprocess=exported.preprocess.model_dump_json(),
        tokenizer=None if exported.tokenizer is None else exported.tokenizer.model_dump_json(),
        intra_op_thread_count=str(size.threads),  # the onnxruntime backend knows this one; model.py reads it too
        **({CACHE: str(settings.text_cache_mb)} if config.response_cache.enable else {}),
    )
    return config


def _use_exact_mode(config: ModelConfig) -> None:
    """Compute products of 8-bit weights exactly; they overflow on x86 CPUs without VNNI instructions.

    Triton's onnxruntime backend passes few options on (as of June 2026 not this one), so on a CPU that overflows its
    optimiser is turned down too: INT8 is then computed in float32, correct and no faster than float32.
    """
    set_parameters(config, **{EXACT_MODE: "1"})
    if processor().saturates:
        config.optimization.graph.level = -1


def _run_on_gpus(config: ModelConfig, graph: Graph, count: int, engines: Engines, settings: ServeSettings) -> None:
    """Run engines on their GPUs, with their only profile and with CUDA graphs for the batches they are tuned for."""
    group = config.instance_group.add(count=count)
    group.kind = group.KIND_GPU
    group.gpus.extend(settings.gpus or ())
    group.profile.append("0")
    config.default_model_filename = "model.plan"
    for capability, file in engines.files.items():
        config.cc_model_filenames[capability] = file
    cuda = config.optimization.cuda
    cuda.graphs = cuda.output_copy_stream = True
    batches = sorted({1, min(engines.best_batch, config.max_batch_size), config.max_batch_size})
    has_texts = any(one.end is not None for one in graph.inputs)
    for batch, ids in product(batches, (CAPTION, 0) if has_texts else (0,)):
        spec = cuda.graph_spec.add(batch_size=batch)
        for one in graph.inputs:
            spec.input[one.name].dim.extend(one.sides(ids))


def _prepare(served: Served, sent: str) -> ModelConfig:
    """Describe the model that makes a graph's input from images, or from texts."""
    exported, settings = served.exported, served.settings
    graph, gives = next(iter(inputs_for(exported, sent).items()))
    config = begin(PREPARED_BY[sent], "python", served.largest_batch_of(sent))
    config.input.add(name=sent, data_type=STRING, dims=[1])
    config.output.add(name=gives.name, data_type=TYPES[gives.dtype], dims=dims_of(gives))
    add_instances(config, helpers(settings, served.sizes[graph]) if sent == IMAGE else 1)  # tokenizing is cheap
    batch_requests(config, settings)
    add_warm_up(config, sent, 1, {sent: {"input_data_file": sent}})  # zeros are no image
    if sent == IMAGE:
        set_parameters(config, preprocess=exported.preprocess.model_dump_json())
    else:
        end = None if gives.end is None else json.dumps(asdict(gives.end))
        set_parameters(config, tokenizer=exported.tokenizer.model_dump_json(), text_end=end)
    return config


def _fused(served: Served, graph: Graph, name: str) -> ModelConfig:
    """Run a very small graph where its input is prepared: passing tensors between models would take as long."""
    (one,) = graph.inputs
    config = _prepare(served, sent_for(served.exported, one))
    config.name = name
    config.ClearField("output")
    add_outputs(config, graph.outputs)
    config.ClearField("instance_group")
    add_instances(config, helpers(served.settings))
    limit_rate(config, served.settings)
    _cache_texts(config, served, graph)
    set_parameters(config, intra_op_thread_count=str(served.sizes[graph.name].threads))
    return config


def _ensemble(served: Served, graph: Graph, name: str) -> ModelConfig:
    """Chain the models that prepare inputs and the graph's own. Queues and instances are those of the parts."""
    exported = served.exported
    config = begin(name, "", served.largest_batch(graph.name))
    config.platform = "ensemble"
    steps = config.ensemble_scheduling.step
    for one in graph.inputs:
        if sent := sent_for(exported, one):
            config.input.add(name=sent, data_type=STRING, dims=[1])
            step = steps.add(model_name=PREPARED_BY[sent], model_version=-1)
            step.input_map[sent], step.output_map[one.name] = sent, one.name
        else:
            config.input.add(name=one.name, data_type=TYPES[one.dtype], dims=dims_of(one))
    add_outputs(config, graph.outputs)
    step = steps.add(model_name=model_of(graph), model_version=-1)
    for one in graph.inputs:
        step.input_map[one.name] = one.name
    for one in graph.outputs:
        step.output_map[one.name] = one.name
    return config


def _classify_zero_shot(served: Served) -> ModelConfig:
    """Classify images among labels that the request names.

    There is no warm-up, since the models it calls may not be loaded yet. They batch what its instances send.
    """
    config = begin("classify", "python", 0)
    config.input.add(name=IMAGE, data_type=STRING, dims=[-1])
    config.input.add(name="labels", data_type=STRING, dims=[-1])
    config.input.add(name="templates", data_type=STRING, dims=[-1], optional=True)
    config.input.add(name="softmax", data_type=BOOL, dims=[1], optional=True)
    config.output.add(name="probabilities", data_type=FP32, dims=[-1, -1])
    add_instances(config, helpers(served.settings))
    set_parameters(
        config,
        logit_scale=repr(served.exported.logit_scale),
        logit_bias=None if served.exported.logit_bias is None else repr(served.exported.logit_bias),
        label_cache_mb=str(served.settings.label_cache_mb),
        image_batch=str(served.largest_batch(IMAGE)),
        text_batch=str(served.largest_batch(TEXT)),
    )
    return config


def _classify(served: Served, graph: Graph) -> ModelConfig:
    """Classify images among a classifier's own labels."""
    config = begin("classify", "python", 0)
    config.input.add(name=IMAGE, data_type=STRING, dims=[-1])
    config.output.add(name="probabilities", data_type=FP32, dims=[-1, len(served.exported.labels)])
    _read_scores(config, served, graph, chain_of(served.exported, graph))
    return config


def _segment(served: Served, graph: Graph) -> ModelConfig:
    """Give the class of every pixel of an image of any size."""
    config = begin("segment", "python", 0)
    config.input.add(name=IMAGE, data_type=STRING, dims=[1])
    config.output.add(name="mask", data_type=UINT16, dims=[-1, -1])
    _read_scores(config, served, graph, model_of(graph))
    set_parameters(config, preprocess=served.exported.preprocess.model_dump_json())
    return config


def _read_scores(config: ModelConfig, served: Served, graph: Graph, scores_model: str) -> None:
    """Let a model ask another one for scores, and give their labels too."""
    config.output.add(name="labels", data_type=STRING, dims=[len(served.exported.labels)])
    add_instances(config, helpers(served.settings))
    set_parameters(
        config,
        labels=json.dumps(served.exported.labels),
        scores_model=scores_model,
        scores=graph.outputs[0].name,
        image_batch=str(served.largest_batch(graph.name)),
    )


def _search(served: Served) -> ModelConfig:
    config = begin("search", "python", 0)
    config.input.add(name=TEXT, data_type=STRING, dims=[-1])
    config.input.add(name="k", data_type=INT32, dims=[1], optional=True)
    config.output.add(name="scores", data_type=FP32, dims=[-1, -1])
    config.output.add(name="keys", data_type=STRING, dims=[-1, -1])
    add_instances(config, 1)  # each holds the index
    set_parameters(config, text_batch=str(served.largest_batch(TEXT)))
    return config


def _cache_texts(config: ModelConfig, served: Served, graph: Graph) -> None:
    if served.settings.text_cache_mb and _sent(served.exported, graph.inputs) == {TEXT}:
        config.response_cache.enable = True


def _sent(exported: Exported, inputs: Sequence[Input]) -> set[str | None]:
    return {sent_for(exported, one) for one in inputs}
