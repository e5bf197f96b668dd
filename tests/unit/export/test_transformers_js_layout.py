"""Layouts read by transformers.js in Node: its encoders and pipeline give what our export does, in every dtype there is."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from int8_models import quantized
from layout_jobs import TEXTS, embedded, exported_job, few_scenes, two_images
from layouts_oracle import TEXTS as OTHER_TEXTS
from layouts_oracle import TOKENIZERS

from clipress.export import onnx_file
from clipress.export.layouts import write_layout
from clipress.metrics.classify import softmax
from clipress.models.tiny import tiny_architecture
from clipress.runtime.export_folder import read_export

JS = Path(sys.prefix, "js")
PROGRAM = """
import { env, pipeline, AutoTokenizer, AutoProcessor, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage }
  from '@huggingface/transformers';
import { readFileSync } from 'fs';
env.allowRemoteModels = false; env.localModelPath = process.argv[2];
const given = JSON.parse(readFileSync(process.argv[3]));
const options = {local_files_only: true, ...given.options};
const tokenizer = await AutoTokenizer.from_pretrained('model', options);
const texts = await CLIPTextModelWithProjection.from_pretrained('model', options);
const { text_embeds } = await texts(tokenizer(given.texts, {padding: given.padding, truncation: true}));
const processor = await AutoProcessor.from_pretrained('model', options);
const visual = await CLIPVisionModelWithProjection.from_pretrained('model', options);
const { image_embeds } = await visual(await processor(await RawImage.read(given.image)));
const found = {texts: text_embeds.tolist(), images: image_embeds.tolist()};
if (given.labels) {
  const classify = await pipeline('zero-shot-image-classification', 'model', options);
  found.scores = await classify(given.image, given.labels, {hypothesis_template: '{}'});
}
console.log(JSON.stringify(found));
"""
LABELS = ["a photo of a cat", "a dog", "naïve café"]
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(
        shutil.which("node") is None or not (JS / "node_modules" / "@huggingface" / "transformers").is_dir(),
        reason="needs Node and transformers.js, which `make test` installs",
    ),
]


def read(folder, home, texts=TEXTS[:4], padding=True, labels=None, **options):
    """Return what transformers.js makes of texts and of an image of the model's size, since its resizing is not Pillow's."""
    home.mkdir(exist_ok=True)
    (home / "model").symlink_to(folder)
    (home / "node_modules").symlink_to((JS / "node_modules").resolve())
    (home / "embed.mjs").write_text(PROGRAM)
    two_images()[0].save(home / "image.png")
    given = {"texts": texts, "image": str(home / "image.png"), "padding": padding, "labels": labels, "options": options}
    (home / "given.json").write_text(json.dumps(given))
    run = ["node", "embed.mjs", f"{home}/", "given.json"]
    done = subprocess.run(run, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_as_exported(job, found, padded=1e-5):
    texts, images = embedded(job, TEXTS[:4], two_images()[:1])
    np.testing.assert_allclose(found["texts"], texts, atol=padded)
    np.testing.assert_allclose(found["images"], images, atol=max(1e-4, padded))
    return texts, images


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A CLIP's export with its float16 and joint files."""
    return exported_job(tmp_path_factory.mktemp("full"), fp16=True, joint=True)


@pytest.mark.parametrize("padding", [True, "max_length"])
def test_it_embeds_as_the_export_does_without_a_given_dtype(full, tmp_path, padding):
    write_layout("transformers.js", full, tmp_path / "model")
    assert_as_exported(full, read(tmp_path / "model", tmp_path / "js", padding=padding))


def test_float16_files_are_its_dtype_fp16(full, tmp_path):
    write_layout("transformers.js", full, tmp_path / "model")
    quick = {"graphOptimizationLevel": "extended"}  # beyond it ONNX Runtime cannot load float16 convolutions on a CPU
    found = read(tmp_path / "model", tmp_path / "js", dtype="fp16", session_options=quick)
    texts, _ = assert_as_exported(full, found, padded=2e-3)
    assert not np.array_equal(np.float32(found["texts"]), texts)


def test_the_joint_file_is_what_its_pipeline_runs(full, tmp_path):
    write_layout("transformers.js", full, tmp_path / "model")
    scores = {row["label"]: row["score"] for row in read(tmp_path / "model", tmp_path / "js", labels=LABELS)["scores"]}
    texts, images = embedded(full, LABELS, two_images()[:1])
    wanted = softmax(full.exported.logit_scale * images @ texts.T)[0]
    np.testing.assert_allclose([scores[label] for label in LABELS], wanted, atol=1e-4)


def test_int8_files_are_its_dtype_q8_and_computed_alike(tmp_path):
    job = exported_job(tmp_path, quantized(tiny_architecture(), few_scenes()), fp16=True, joint=True)
    folder = write_layout("transformers.js", job, tmp_path / "model")
    names = {"text_model_quantized.onnx", "vision_model_quantized.onnx", "model_quantized.onnx"}
    assert {path.name for path in (folder / "onnx").iterdir()} == names  # it has no name for INT8 with float16
    for number, options in enumerate(({}, {"dtype": "q8"})):
        assert_as_exported(job, read(folder, tmp_path / f"js{number}", **options))


def test_weights_beside_the_graphs_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "LIMIT", 0)
    job = exported_job(tmp_path)
    folder = write_layout("transformers.js", job, tmp_path / "model")
    assert (folder / "onnx" / "text_model.onnx_data").stat().st_size > 1 << 20
    assert_as_exported(job, read(folder, tmp_path / "js"))


@pytest.mark.parametrize("case", TOKENIZERS)
def test_it_reads_the_tokenizers_of_transformers_and_takes_sigmoids_of_a_siglip(others, tmp_path, case):
    home, texts = others / case, OTHER_TEXTS[:4]  # it cuts the end token off the fifth, which is too long
    found = read(home / "transformers.js", tmp_path / "js", texts, "max_length", labels=texts)
    wanted, exported = np.load(home / "expected.npz")["texts"][:4], read_export(home / "e")
    np.testing.assert_allclose(found["texts"], wanted, atol=1e-5)
    logits = exported.logit_scale * np.float32(found["images"]) @ wanted.T + (exported.logit_bias or 0)
    scores = {row["label"]: row["score"] for row in found["scores"]}
    expected = 1 / (1 + np.exp(-logits)) if case.startswith("siglip") else softmax(logits)
    np.testing.assert_allclose([scores[text] for text in texts], expected[0], atol=1e-5, rtol=1e-3)
