"""INT8 files agree with exact integer arithmetic on every CPU that this machine has, hides or emulates."""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from int8_models import CONVOLUTIONAL, quantized
from onnx import TensorProto, helper, numpy_helper, version_converter
from onnx.reference import ReferenceEvaluator

from clipress.artifact import save_artifact
from clipress.data.eval_sets import evalsets
from clipress.data.spec import SourceSpec
from clipress.export import metadata, parity
from clipress.export.settings import OnnxSettings
from clipress.export.to_onnx import onnx_from_artifact
from clipress.models.load import artifact_from_model
from clipress.models.tiny import tiny_architecture
from clipress.runtime.cpu import processor
from clipress.studies import cpus
from clipress.tasks import model_from_artifact, task_named

MODES = ("default", "exact")
JOB = Path(__file__).parents[2] / "session_job.py"
FILES = {"image": "vit/image.onnx", "text": "vit/text.onnx", "convolutional": "resnet/image.onnx"}
WIDE = "wide/image.onnx"  # Weights of 8 bits.
NAMES = {"image": "pixel_values", "text": "input_ids"}
OVERFLOWING = {cpus.EMULATED, "avx2", "avx512", *([cpus.NATIVE] if processor().saturates else [])}


@dataclass(frozen=True)
class Case:
    """A file, the mode it is opened in, and its inputs."""

    path: Path
    mode: str
    inputs: dict


@pytest.fixture(scope="module")
def sets():
    return evalsets([SourceSpec(format="scenes", split="test", limit=20)])


@pytest.fixture(scope="module")
def home(sets, tmp_path_factory):
    """Exports of a transformer and of a convolutional tower, and of the transformer with 8-bit weights."""
    folder = tmp_path_factory.mktemp("every-cpu")
    models = {
        "vit": (quantized(tiny_architecture(layers=2), sets), "auto"),
        "resnet": (quantized(CONVOLUTIONAL, sets), "static"),
        "wide": (quantized(tiny_architecture(layers=2), sets, portable=False), "auto"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for precision in ("int8", "static int8"):  # Untrained models round worse than trained ones.
            patch.setitem(parity.LIMITS, precision, (0.98, 0.3, 5e-2))
        for name, (model, form) in models.items():
            artifact = artifact_from_model(model, ({"stage": name, "hash": name},), {})
            save_artifact(artifact, folder / "artifacts" / name)
            settings = OnnxSettings(exporter="torchscript", int8=form)
            onnx_from_artifact(folder / "artifacts" / name, folder / name, settings, sets)
    return folder


@pytest.fixture(scope="module")
def samples(home, sets):
    model = model_from_artifact(home / "artifacts" / "vit")
    samples = task_named(model.task).samples(sets, model.preprocess, model.tokenize())
    return {tower: rows[:6] for tower, inputs in samples.items() for rows in inputs.values()}


def product(weights):
    """Return a graph with one u8 x s8 -> int32 product."""
    takes = helper.make_tensor_value_info("activations", TensorProto.UINT8, ["batch", len(weights)])
    gives = helper.make_tensor_value_info("sums", TensorProto.INT32, ["batch", weights.shape[1]])
    node = helper.make_node("MatMulInteger", ["activations", "weights"], ["sums"])
    graph = helper.make_graph([node], "product", [takes], [gives], [numpy_helper.from_array(weights, "weights")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.fixture(scope="module")
def products(home):
    """Files with the largest weights of 7 and 8 bits, the largest activations, and the weights."""
    random = np.random.default_rng(0)
    activations = random.integers(250, 256, (32, 96)).astype(np.uint8)
    weights = {n: (n * random.choice([-1, 1, 1], (96, 48))).astype(np.int8) for n in (64, 127)}
    for n, values in weights.items():
        onnx.save(product(values), home / f"product-{n}.onnx")
    return {n: home / f"product-{n}.onnx" for n in weights}, activations, weights


@pytest.fixture(scope="module", params=[cpus.NATIVE, *cpus.HIDDEN, cpus.EMULATED])
def answers(request, home, samples, products, tmp_path_factory):
    """One CPU's results for every file in every mode: (CPU, {(file, mode): result})."""
    if reason := cpus.missing(request.param):
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("answers")
    towers = {name: "text" if name == "text" else "image" for name in FILES}
    cases = {
        (n, mode): Case(path, mode, {"activations": products[1]}) for n, path in products[0].items() for mode in MODES
    }
    cases |= {(name, "auto"): Case(home / file, "auto", feed(samples, towers[name])) for name, file in FILES.items()}
    cases |= {("wide", mode): Case(home / WIDE, mode, feed(samples, "image")) for mode in ("auto", "default")}
    if importlib.util.find_spec("openvino"):
        files = {**FILES, "wide": WIDE}
        cases |= {
            (name, "openvino"): Case(home / file, "openvino", feed(samples, towers.get(name, "image")))
            for name, file in files.items()
        }
    jobs = []
    for number, case in enumerate(cases.values()):
        np.savez(folder / f"{number}.npz", **case.inputs)
        jobs.append({"path": str(case.path), "mode": case.mode, "inputs": str(folder / f"{number}.npz")})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    ran = cpus.python(request.param, JOB, folder / "jobs.json", folder / "out.json")
    assert ran.returncode == 0, ran.stderr
    results = json.loads((folder / "out.json").read_text())
    if request.param in OVERFLOWING:
        assert results["saturates"]  # Detected although /proc/cpuinfo describes another CPU.
    return request.param, dict(zip(cases, results["jobs"], strict=True))


def feed(samples, tower):
    return {NAMES[tower]: samples[tower]}


def outputs(answer):
    with np.load(answer["outputs"]) as found:
        (rows,) = found.values()
    return rows


def exactly(path, inputs):
    """Return the output of ONNX's reference evaluator, which has no kernels of ONNX Runtime."""
    # The evaluator does not support Q/DQ of older opsets.
    model = version_converter.convert_version(onnx.load(path), 19)
    return ReferenceEvaluator(model).run(None, inputs)[0]


def cosines(a, b):
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_default_form_is_exact_on_every_cpu(answers, home, samples, name):
    _, answer = answers
    expected = exactly(home / FILES[name], feed(samples, "text" if name == "text" else "image"))
    assert cosines(outputs(answer[name, "auto"]), expected).min() >= 0.9999
    assert not answer[name, "auto"]["exact"] and not answer[name, "auto"]["warnings"]


def test_products_in_7_bits_are_exact_integers_on_every_cpu(answers, products):
    _, answer = answers
    _, activations, weights = products
    wanted = activations.astype(np.int64) @ weights[64].astype(np.int64)
    np.testing.assert_array_equal(outputs(answer[64, "default"]), wanted)


def test_products_in_8_bits_overflow_without_vnni_unless_the_mode_is_exact(answers, products):
    cpu, answer = answers
    _, activations, weights = products
    wanted = activations.astype(np.int64) @ weights[127].astype(np.int64)
    np.testing.assert_array_equal(outputs(answer[127, "exact"]), wanted)
    assert (outputs(answer[127, "default"]) == wanted).all() == (cpu not in OVERFLOWING)


def test_a_file_in_8_bits_is_opened_in_the_correct_mode_with_a_warning(answers, home, samples):
    cpu, answer = answers
    opened = answer["wide", "auto"]
    assert cosines(outputs(opened), exactly(home / WIDE, feed(samples, "image"))).min() >= 0.9999
    if cpu in OVERFLOWING:
        (line,) = opened["warnings"]
        assert opened["exact"] and "exact mode: correct, but slower" in line and "portable: true" in line


def test_a_session_that_overflows_fails_the_self_test_with_the_cpu_and_what_to_do(answers):
    cpu, answer = answers
    opened = answer["wide", "default"]
    if cpu not in OVERFLOWING:
        assert "error" not in opened
        return
    for words in (
        "fails its self-test on this machine",
        "avx2",
        "onnxruntime",
        "portable: true",
        "avx512_vnni or avx_vnni",
    ):
        assert words in opened["error"]


def test_openvino_computes_portable_files_on_every_cpu_and_is_refused_those_that_overflow(answers, home, samples):
    cpu, answer = answers
    pytest.importorskip("openvino")
    for name, file in FILES.items():
        expected = exactly(home / file, feed(samples, "text" if name == "text" else "image"))
        assert cosines(outputs(answer[name, "openvino"]), expected).min() >= 0.9999
    wide = answer["wide", "openvino"]
    assert ("fails its self-test" in wide.get("error", "")) == (cpu in OVERFLOWING)
    assert "openvino" in wide.get("error", "openvino")


def test_metadata_record_whether_a_file_is_portable(home):
    portable = {
        name: metadata.read_metadata(onnx.load(home / file))["portable"]
        for name, file in {**FILES, "wide": WIDE}.items()
    }
    assert portable == {"image": True, "text": True, "convolutional": True, "wide": False}
    exported = {name: json.loads((home / name / "export.json").read_text())["portable"] for name in ("vit", "wide")}
    assert exported == {"vit": True, "wide": False}
