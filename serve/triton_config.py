"""Triton's config.pbtxt of every model, filled into Triton's own protobuf and printed from it: no field can be misspelt.

Shapes are without the batch, which `max_batch_size` stands for; models whose requests hold lists of several lengths have
`max_batch_size` 0 and say -1. `parameters` carry preprocessing, tokenizer and logit scale: a client, and the python models,
need nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clipress.errors import ExportError
from clipress.runtime.cpu import processor
from clipress.runtime.export_folder import Exported
from clipress.runtime.onnx_session import EXACT_MODE
from clipress.serve.engines import Plans
from clipress.serve.settings import ServeSettings
from clipress.serve.sizing import Sizing, helpers

if TYPE_CHECKING:
    from pathlib import Path

    from tritonclient.grpc.model_config_pb2 import ModelConfig

FP32, INT32, INT64, STRING = "TYPE_FP32", "TYPE_INT32", "TYPE_INT64", "TYPE_STRING"
TAKES = {"image": "pixel_values", "text": "input_ids"}  # of the encoders
STAND_BY = 1000  # to the rate limiter an instance of this priority has run that often when it has run once
CACHE = "text_cache_mb"  # what a server must be told of, and so is kept in a configuration
PICTURE, TEXT = "picture", "text"  # files of real inputs, to warm up with: zeros are no picture


@dataclass(frozen=True)
class Served:
    """What configurations are made from."""

    exported: Exported
    backend: str
    settings: ServeSettings
    sizes: Mapping[str, Sizing]
    """Per tower."""
    plans: Mapping[str, Plans]
    """Per tower; empty unless the backend is tensorrt."""
    fused: Set[str] = frozenset()
    """Towers whose embed_* runs the encoder itself."""

    @property
    def needs_exact_mode(self) -> bool:
        """Whether a session of Triton's own would overflow on x86 CPUs without VNNI instructions."""
        return self.backend == "onnxruntime" and self.exported.precision == "int8" and not self.exported.portable

    def largest_batch(self, tower: str) -> int:
        """Return how many rows a tower takes at once."""
        asked = self.settings.max_batch
        return min(asked, self.plans[tower].largest_batch) if tower in self.plans else asked


def configs(served: Served, with_search: bool) -> dict[str, ModelConfig]:
    """Return the configuration of every model by its name."""
    made = [
        _encoder(served, "image"),
        _encoder(served, "text"),
        _preprocess(served),
        _tokenize(served),
        _fused(served, "image") if "image" in served.fused else _ensemble(served, "image", "preprocess"),
        _fused(served, "text") if "text" in served.fused else _ensemble(served, "text", "tokenize"),
        _classify(served),
        *([_search(served)] if with_search else []),
    ]
    for config in made:
        config.parameters["lineage_hash"].string_value = served.exported.lineage_hash
    return {config.name: config for config in made}


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


def config_from(text: str) -> ModelConfig:
    """Read a config.pbtxt. Raises ExportError."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as triton

    try:
        return text_format.Parse(text, triton.ModelConfig())
    except text_format.ParseError as error:
        raise ExportError(f"A config.pbtxt is not readable: {error}.") from None


def server_options(repository: Path) -> list[str]:
    """Return what a server of this repository must be told beside where it is."""
    return options_for([config_from(path.read_text(encoding="utf-8")) for path in repository.glob("*/config.pbtxt")])


def options_for(models: Collection[ModelConfig]) -> list[str]:
    """Return what a server of these models must be told: to heed its rate limiter, to have a cache."""
    limited = any(group.HasField("rate_limiter") for config in models for group in config.instance_group)
    cache = max(
        (int(config.parameters[CACHE].string_value) for config in models if CACHE in config.parameters), default=0
    )
    return [
        *(["--rate-limit=execution_count"] if limited else []),
        *([f"--cache-config=local,size={cache << 20}"] if cache else []),
    ]


def _encoder(served: Served, tower: str) -> ModelConfig:
    exported, settings, size = served.exported, served.settings, served.sizes[tower]
    side, length = exported.preprocess.size, exported.tokenizer.context_length
    type_, dims, sample = {  # random ids would exceed the vocabulary
        "image": (FP32, [3, side, side], {"random_data": True}),
        "text": (INT64, [length], {"zero_data": True}),
    }[tower]
    largest = served.largest_batch(tower)
    config = _model(f"{tower}_encoder", served.backend, largest)
    config.input.add(name=TAKES[tower], data_type=type_, dims=dims)
    config.output.add(name=f"{tower}_embeds", data_type=FP32, dims=[exported.embed_dim])
    if served.needs_exact_mode:
        _exactly(config)
    if served.plans:
        _on_gpus(config, size.instances, served.plans[tower], settings)
    else:
        _instances(config, size.instances)
    _limited(config, settings)
    _batching(config, settings)
    if size.preferred_batch is not None and size.preferred_batch < largest:
        config.dynamic_batching.preferred_batch_size.append(size.preferred_batch)
    _cached(config, tower, settings)
    for batch in sorted({1, largest}):  # before the first client, at both ends of memory use
        _warm_up(config, f"batch_{batch}", batch, sample)
    _tell(
        config,
        logit_scale=repr(exported.logit_scale),
        precision=exported.precision,
        preprocess=exported.preprocess.model_dump_json(),
        tokenizer=exported.tokenizer.model_dump_json(),
        intra_op_thread_count=str(size.threads),  # the onnxruntime backend knows this one; model.py reads it too
        **({CACHE: str(settings.text_cache_mb)} if config.response_cache.enable else {}),
    )
    return config


def _exactly(config: ModelConfig) -> None:
    """Ask for exact products of 8-bit weights, which overflow on x86 CPUs without VNNI instructions.

    Triton's onnxruntime backend hands few options on (as of June 2026 not this one), so on a CPU that overflows its optimiser is
    turned down too: INT8 is computed in float32 then, correct and no faster than float32.
    """
    _tell(config, **{EXACT_MODE: "1"})
    if processor().saturates:
        config.optimization.graph.level = -1


def _on_gpus(config: ModelConfig, count: int, plans: Plans, settings: ServeSettings) -> None:
    """Engines: on their GPUs, by the one profile they have, with CUDA graphs of the batches they are tuned for."""
    group = config.instance_group.add(count=count)
    group.kind = group.KIND_GPU
    group.gpus.extend(settings.gpus or ())
    group.profile.append("0")
    config.default_model_filename = "model.plan"
    for capability, file in plans.files.items():
        config.cc_model_filenames[capability] = file
    cuda = config.optimization.cuda
    cuda.graphs = cuda.output_copy_stream = True
    (takes,) = config.input
    for batch in sorted({1, min(plans.best_batch, config.max_batch_size), config.max_batch_size}):
        cuda.graph_spec.add(batch_size=batch).input[takes.name].dim.extend(takes.dims)


def _preprocess(served: Served) -> ModelConfig:
    side = served.exported.preprocess.size
    config = _model("preprocess", "python", served.largest_batch("image"))
    config.input.add(name="image", data_type=STRING, dims=[1])
    config.output.add(name=TAKES["image"], data_type=FP32, dims=[3, side, side])
    _instances(config, helpers(served.settings, served.sizes["image"]))
    _batching(config, served.settings)
    _warm_up(config, PICTURE, 1, {"input_data_file": PICTURE})
    _tell(config, preprocess=served.exported.preprocess.model_dump_json())
    return config


def _tokenize(served: Served) -> ModelConfig:
    config = _model("tokenize", "python", served.largest_batch("text"))
    config.input.add(name="text", data_type=STRING, dims=[1])
    config.output.add(name=TAKES["text"], data_type=INT64, dims=[served.exported.tokenizer.context_length])
    _instances(config, 1)  # it has little to do
    _batching(config, served.settings)
    _warm_up(config, TEXT, 1, {"input_data_file": TEXT})
    _tell(config, tokenizer=served.exported.tokenizer.model_dump_json())
    return config


def _fused(served: Served, tower: str) -> ModelConfig:
    """Let what prepares an input run the encoder too: of a very small one, the way from model to model takes as long."""
    config = {"image": _preprocess, "text": _tokenize}[tower](served)
    config.name = f"embed_{tower}"
    (gives,) = config.output
    gives.name, gives.data_type, gives.dims[:] = f"{tower}_embeds", FP32, [served.exported.embed_dim]
    config.ClearField("instance_group")
    _instances(config, helpers(served.settings))
    _limited(config, served.settings)
    _cached(config, tower, served.settings)
    _tell(config, intra_op_thread_count=str(served.sizes[tower].threads))
    return config


def _ensemble(served: Served, tower: str, first: str) -> ModelConfig:
    """Chain what prepares an input and its encoder. Neither queue nor instances: these are its parts' own."""
    between, gives = TAKES[tower], f"{tower}_embeds"
    config = _model(f"embed_{tower}", "", served.largest_batch(tower))
    config.platform = "ensemble"
    config.input.add(name=tower, data_type=STRING, dims=[1])
    config.output.add(name=gives, data_type=FP32, dims=[served.exported.embed_dim])
    prepared = config.ensemble_scheduling.step.add(model_name=first, model_version=-1)
    prepared.input_map[tower], prepared.output_map[between] = tower, between
    encoded = config.ensemble_scheduling.step.add(model_name=f"{tower}_encoder", model_version=-1)
    encoded.input_map[between], encoded.output_map[gives] = between, gives
    return config


def _classify(served: Served) -> ModelConfig:
    """No warm-up: it calls models that need not be loaded yet. They batch what its instances ask at the same time."""
    config = _model("classify", "python", 0)
    config.input.add(name="image", data_type=STRING, dims=[-1])
    config.input.add(name="labels", data_type=STRING, dims=[-1])
    config.input.add(name="templates", data_type=STRING, dims=[-1], optional=True)
    config.output.add(name="probabilities", data_type=FP32, dims=[-1, -1])
    _instances(config, helpers(served.settings))
    _tell(
        config,
        logit_scale=repr(served.exported.logit_scale),
        label_cache_mb=str(served.settings.label_cache_mb),
        image_batch=str(served.largest_batch("image")),
        text_batch=str(served.largest_batch("text")),
    )
    return config


def _search(served: Served) -> ModelConfig:
    config = _model("search", "python", 0)
    config.input.add(name="text", data_type=STRING, dims=[-1])
    config.input.add(name="k", data_type=INT32, dims=[1], optional=True)
    config.output.add(name="scores", data_type=FP32, dims=[-1, -1])
    config.output.add(name="keys", data_type=STRING, dims=[-1, -1])
    _instances(config, 1)  # each holds the index
    _tell(config, text_batch=str(served.largest_batch("text")))
    return config


def _model(name: str, backend: str, max_batch: int) -> ModelConfig:
    """Begin a configuration. A response cache is only there when asked for: Triton's keeps errors too."""
    from tritonclient.grpc import model_config_pb2 as triton

    config = triton.ModelConfig(name=name, backend=backend, max_batch_size=max_batch)
    config.version_policy.latest.num_versions = 1
    return config


def _instances(config: ModelConfig, count: int) -> None:
    """Add instances on CPUs, of which the first works whenever it is idle: those that take turns find their caches cold."""
    first = config.instance_group.add(count=1)
    first.kind = first.KIND_CPU
    if count > 1:
        others = config.instance_group.add(count=count - 1)
        others.kind = others.KIND_CPU
        first.rate_limiter.priority, others.rate_limiter.priority = 1, STAND_BY


def _limited(config: ModelConfig, settings: ServeSettings) -> None:
    if settings.rate_limit is not None:
        for group in config.instance_group:
            limiter = group.rate_limiter
            limiter.priority = settings.rate_limit.priority * max(1, limiter.priority)
            for name, count in settings.rate_limit.resources.items():
                limiter.resources.add(name=name, count=count)


def _cached(config: ModelConfig, tower: str, settings: ServeSettings) -> None:
    if tower == "text" and settings.text_cache_mb:
        config.response_cache.enable = True


def _batching(config: ModelConfig, settings: ServeSettings) -> None:
    config.dynamic_batching.SetInParent()  # being there, even empty, is what switches it on
    config.dynamic_batching.max_queue_delay_microseconds = settings.queue_delay_us
    if settings.queue_size or settings.queue_timeout_ms:
        queue = config.dynamic_batching.default_queue_policy
        queue.max_queue_size = settings.queue_size
        queue.default_timeout_microseconds = 1000 * settings.queue_timeout_ms
        queue.allow_timeout_override = True  # a client may ask for less


def _warm_up(config: ModelConfig, name: str, batch: int, sample: Mapping[str, Any]) -> None:
    from tritonclient.grpc import model_config_pb2 as triton

    (takes,) = config.input
    warm_up = config.model_warmup.add(name=name, batch_size=batch)
    filled = triton.ModelWarmup.Input(data_type=takes.data_type, dims=takes.dims, **sample)
    warm_up.inputs[takes.name].CopyFrom(filled)


def _tell(config: ModelConfig, **parameters: str) -> None:
    for key, value in parameters.items():
        config.parameters[key].string_value = value
