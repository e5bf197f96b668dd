"""Probabilities of labels: a SigLIP's are sigmoids with its bias, as torch computes them; a CLIP's are a softmax."""

import asyncio
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from PIL import Image
from tritonclient.grpc.model_config_pb2 import ModelConfig

import clipress
from clipress.artifact import save_artifact
from clipress.data.eval_sets import evalsets
from clipress.data.spec import SourceSpec
from clipress.data.transforms import fitted, normalised
from clipress.export.extra_models import extra_models_from_export
from clipress.export.settings import OnnxSettings
from clipress.export.to_onnx import onnx_from_artifact
from clipress.models.load import artifact_from_model, new_model
from clipress.models.tiny import tiny_architecture
from clipress.runtime.onnx_session import metadata_of, open_session, run_from_onnx
from clipress.serve.settings import ServeSettings
from clipress.serve.triton_repo import triton_repo_from_export

LABELS, BIAS, SCALE = ("zero", "one", "a red square"), -1.5, 12.0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A SigLIP and a CLIP that differ in the bias alone, exported with a classifier."""
    folder, models = tmp_path_factory.mktemp("run"), {}
    sets = evalsets([SourceSpec(format="scenes", split="test", limit=20)])
    for name, bias in (("siglip", BIAS), ("clip", None)):
        model = new_model({**tiny_architecture(layers=1), "init_logit_bias": bias}, 0)
        model.module.logit_scale.data.fill_(np.log(SCALE))
        save_artifact(artifact_from_model(model, ({"stage": name, "hash": name},), {}), folder / name)
        onnx_from_artifact(folder / name, folder / "export" / name, OnnxSettings(exporter="torchscript"), sets)
        models[name] = model
    return folder, models, sets


def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(4)]


def pixels_for(model):
    return normalised(np.stack([fitted(image, model.preprocess) for image in images()]), model.preprocess)


def logits_of(model, bias):
    """open_clip's own: scale * image @ text.T + bias, as transformers' `logits_per_image` is."""
    pixels = torch.from_numpy(pixels_for(model))
    ids = torch.from_numpy(model.tokenize()([f"a photo of a {label}" for label in LABELS]))
    with torch.no_grad():
        image, text = model.module.encode_image(pixels, normalize=True), model.module.encode_text(ids, normalize=True)
        return model.module.logit_scale.exp() * image @ text.T + (bias or 0.0)


@pytest.fixture
def wanted(run):
    _, models, _ = run
    siglip = logits_of(models["siglip"], models["siglip"].module.logit_bias)
    assert float(models["siglip"].module.logit_bias) == BIAS
    return {
        ("siglip", False): siglip.sigmoid().numpy(),
        ("siglip", True): siglip.softmax(1).numpy(),
        ("clip", False): logits_of(models["clip"], None).softmax(1).numpy(),
        ("clip", True): logits_of(models["clip"], None).softmax(1).numpy(),
    }


CASES = [("siglip", False), ("siglip", True), ("clip", False), ("clip", True)]


@pytest.mark.parametrize(("name", "softmax"), CASES)
def test_a_loaded_export_gives_the_probabilities_of_torch(run, wanted, name, softmax):
    model = clipress.load(run[0] / "export" / name)
    found = model.classify(images(), LABELS, softmax=softmax)
    np.testing.assert_allclose(found, wanted[name, softmax], atol=1e-5)
    assert found.dtype == np.float32
    assert np.allclose(found.sum(1), 1) == ((name, softmax) != ("siglip", False))


@pytest.mark.parametrize(("name", "softmax"), CASES)
def test_a_classifier_file_gives_the_probabilities_of_torch_and_says_which(run, wanted, name, softmax):
    folder, models, sets = run
    settings = OnnxSettings(exporter="torchscript", labels=LABELS, softmax=softmax, fp16=not softmax)
    files = extra_models_from_export(folder / "export" / name, settings, sets)
    found = run_from_onnx(files["classifier"])({"pixel_values": pixels_for(models[name])})["probabilities"]
    np.testing.assert_allclose(found, wanted[name, softmax], atol=1e-5)
    about = metadata_of(open_session(files["classifier"], 1))
    is_sigmoid = (name, softmax) == ("siglip", False)
    assert about["probabilities"] == ("sigmoid" if is_sigmoid else "softmax")
    assert about["logit_bias"] == (BIAS if name == "siglip" else None)
    assert about["logit_scale"] == pytest.approx(SCALE)


class Tensor(SimpleNamespace):
    def as_numpy(self):
        return self.values


@pytest.mark.parametrize(("name", "softmax"), CASES)
def test_triton_s_model_gives_the_probabilities_of_torch(run, wanted, tmp_path, monkeypatch, name, softmax):
    folder, _, _ = run
    repository = triton_repo_from_export(folder / "export" / name, tmp_path, ServeSettings(backend="python"))[0]
    config = text_format.Parse((repository / "classify" / "config.pbtxt").read_text(), ModelConfig())
    assert ("softmax", True) in [(one.name, one.optional) for one in config.input]
    config = {key: value.string_value for key, value in config.parameters.items()}
    assert ("logit_bias" in config) == (name == "siglip")
    given = {"image": [b"image"] * 4, "labels": [label.encode() for label in LABELS]}
    given |= {"softmax": [True]} if softmax else {}
    backend = ModuleType("triton_python_backend_utils")
    backend.get_input_tensor_by_name = lambda request, key: (
        Tensor(values=np.asarray(request[key])) if key in request else None
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    source, model, local = {}, next(repository.glob("classify/*/model.py")), clipress.load(folder / "export" / name)
    exec(compile(model.read_text(), model, "exec"), source)
    served = source["TritonPythonModel"]()

    async def embed(side, rows, batch):
        if side == "text":
            return local.encode_text([row.decode() for row in rows])
        return local.encode_image(images())

    source["embed"], source["parameters"] = embed, lambda args: config
    served.initialize({})
    found = asyncio.run(served._probabilities(given))["probabilities"]
    np.testing.assert_allclose(found, wanted[name, softmax], atol=1e-5)
