"""Folders in the layouts of other programs: read as those programs read them, they embed as our export does."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import open_clip
import oracles
import pytest
import torch
from helpers import clipress
from PIL import Image
from tokenizers import Tokenizer

from clipress.artifact import load_artifact, save_artifact
from clipress.data.bpe import ALWAYS
from clipress.data.eval_sets import evalsets
from clipress.data.spec import SourceSpec
from clipress.data.tokens import tokenizer_from_spec
from clipress.data.transforms import Preprocess, fitted, normalised
from clipress.data.vocabulary import reduced
from clipress.errors import ExportError, RecipeError
from clipress.export import onnx_file
from clipress.export.layouts import LAYOUTS, LayoutJob, write_layout
from clipress.export.settings import OnnxSettings
from clipress.export.to_onnx import onnx_from_artifact
from clipress.models import anatomy, surgery
from clipress.models.importers import import_checkpoint
from clipress.models.load import artifact_from_model, new_model
from clipress.models.tiny import tiny_architecture
from clipress.runtime.onnx_session import run_from_onnx

TEXTS = ["a photo of a cat", "It's 42 o'clock, isn't it?", "naïve café, Straße", "猫", "word " * 60]
JS = Path(sys.prefix, "js")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    home = tmp_path_factory.mktemp("layouts")
    artifact = save_artifact(
        artifact_from_model(new_model(tiny_architecture(layers=1), 0), ({"stage": "x", "hash": "abc"},), {}), home / "x"
    )
    sets = evalsets([SourceSpec(format="scenes", split="test", limit=8)])
    return LayoutJob(onnx_from_artifact(artifact, home / "e", OnnxSettings(), sets), artifact)


def embedded(job, texts=TEXTS, images=()):
    """Return what the export itself gives: embeddings of texts, and of images."""
    exported = job.exported
    text = run_from_onnx(exported.onnx("text"))({"input_ids": exported.tokenize()(texts)})["text_embeds"]
    if not len(images):
        return text
    pixels = np.stack(
        [normalised(fitted(image, exported.preprocess)[None], exported.preprocess)[0] for image in images]
    )
    return text, run_from_onnx(exported.onnx("image"))({"pixel_values": pixels})["image_embeds"]


def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, size, np.uint8)) for size in ((32, 32, 3), (40, 60, 3))]


@pytest.mark.parametrize("kept", [None, "some"])
def test_tokenizer_json_gives_the_ids_of_the_exported_tokenizer(job, tmp_path, kept):
    spec = job.exported.tokenizer.model_dump()
    if kept:
        spec = reduced(spec, [*ALWAYS[:512], *range(512, 700), *ALWAYS[512:]])
    exported = job.exported.model_copy(update={"tokenizer": type(job.exported.tokenizer)(**spec)})
    write_layout("transformers.js", LayoutJob(exported, job.artifact), tmp_path / "t")
    found = Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json"))
    expected = tokenizer_from_spec(spec)(TEXTS)
    for text, row in zip(TEXTS, expected, strict=True):
        ids = found.encode(text).ids
        assert ids == row[: len(ids)].tolist() and not row[len(ids) :].any()
    padded = found.encode_batch(TEXTS)
    assert {len(one.ids) for one in padded} == {24}  # the longest fills the context
    assert padded[0].ids == expected[0].tolist()


def test_immich_finds_its_files_and_embeds_as_the_export_does(job, tmp_path):
    folder = write_layout("immich", job, tmp_path / "immich")
    tokenizer = Tokenizer.from_file(str(folder / "textual" / "tokenizer.json"))
    length = json.loads((folder / "config.json").read_text())["text_cfg"]["context_length"]
    pad = json.loads((folder / "textual" / "tokenizer_config.json").read_text())["pad_token"]
    tokenizer.enable_padding(length=length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    tokenizer.enable_truncation(max_length=length)
    images = pictures()
    wanted_texts, wanted_images = embedded(job, images=images)
    texts = onnxruntime.InferenceSession(folder / "textual" / "model.onnx")
    for text, wanted in zip(TEXTS, wanted_texts, strict=True):
        found = texts.run(None, {"text": np.array([tokenizer.encode(text).ids], np.int32)})[0][0]
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    preprocess = json.loads((folder / "visual" / "preprocess_cfg.json").read_text())
    preprocess = Preprocess(**{key: value for key, value in preprocess.items() if key != "mode"})
    visual = onnxruntime.InferenceSession(folder / "visual" / "model.onnx")
    for image, wanted in zip(images, wanted_images, strict=True):
        found = visual.run(None, {"image": normalised(fitted(image, preprocess)[None], preprocess)})[0][0]
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_open_clip_loads_its_folder(job, tmp_path):
    folder = write_layout("open_clip", job, tmp_path / "oc")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    ids = torch.from_numpy(job.exported.tokenize()(TEXTS))
    with torch.inference_mode():
        found = model.eval().encode_text(ids, normalize=True).numpy()
    np.testing.assert_allclose(found, embedded(job), atol=1e-5)


def test_a_cut_model_has_no_open_clip_folder(job, tmp_path):
    model = new_model(tiny_architecture(layers=1), 0)
    cut(model)
    saved = save_artifact(artifact_from_model(model, load_artifact(job.artifact).lineage, {}), tmp_path / "cut")
    with pytest.raises(ExportError, match="cut is cut, INT8, resized or has a reduced vocabulary"):
        write_layout("open_clip", LayoutJob(job.exported, saved), tmp_path / "oc")
    assert not (tmp_path / "oc").exists()


def test_weights_beside_a_graph_have_the_name_that_transformers_js_looks_for(job, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "LIMIT", 0)
    sets = evalsets([SourceSpec(format="scenes", split="test", limit=8)])
    large = LayoutJob(onnx_from_artifact(job.artifact, tmp_path / "e", OnnxSettings(), sets), job.artifact)
    folder = write_layout("transformers.js", large, tmp_path / "t") / "onnx"
    names = ["text_model.onnx", "text_model.onnx_data", "vision_model.onnx", "vision_model.onnx_data"]
    assert sorted(path.name for path in folder.iterdir()) == names
    ids = {"input_ids": job.exported.tokenize()(TEXTS)}
    np.testing.assert_allclose(run_from_onnx(folder / names[0])(ids)["text_embeds"], embedded(job), atol=1e-5)


def test_unknown_layouts_and_tokenizers_are_one_message(job, tmp_path):
    with pytest.raises(RecipeError, match=r"transformers\.js"):
        write_layout("transformer.js", job, tmp_path / "t")
    other = job.exported.tokenizer.model_copy(update={"name": "timm/ViT-B-16-SigLIP"})
    exported = job.exported.model_copy(update={"tokenizer": other})
    for name in ("transformers.js", "immich"):
        with pytest.raises(ExportError, match="needs CLIP's own tokenizer, found 'timm/ViT-B-16-SigLIP'"):
            write_layout(name, LayoutJob(exported, job.artifact), tmp_path / "t")
    assert sorted(LAYOUTS) == ["immich", "open_clip", "transformers", "transformers.js"]


PROGRAM = """
import { env, AutoTokenizer, AutoProcessor, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage }
  from '@huggingface/transformers';
import { readFileSync } from 'fs';
env.allowRemoteModels = false; env.localModelPath = process.argv[2];
const given = JSON.parse(readFileSync(process.argv[3]));
const options = {local_files_only: true, dtype: given.dtype};
const tokenizer = await AutoTokenizer.from_pretrained('model', options);
const texts = await CLIPTextModelWithProjection.from_pretrained('model', options);
const { text_embeds } = await texts(tokenizer(given.texts, {padding: true, truncation: true}));
const processor = await AutoProcessor.from_pretrained('model', options);
const visual = await CLIPVisionModelWithProjection.from_pretrained('model', options);
const images = [];
for (const file of given.images) {
  const { image_embeds } = await visual(await processor(await RawImage.read(file)));
  images.push(...image_embeds.tolist());
}
console.log(JSON.stringify({texts: text_embeds.tolist(), images}));
"""


@pytest.mark.oracle
@pytest.mark.skipif(
    shutil.which("node") is None or not (JS / "node_modules" / "@huggingface" / "transformers").is_dir(),
    reason="needs Node and transformers.js, which `make test` installs",
)
def test_transformers_js_embeds_as_the_export_does(job, tmp_path):
    write_layout("transformers.js", job, tmp_path / "model")
    (tmp_path / "node_modules").symlink_to((JS / "node_modules").resolve())
    (tmp_path / "embed.mjs").write_text(PROGRAM)
    images = pictures()[:1]  # of the model's size, since its resizing is not Pillow's
    files = [tmp_path / f"{number}.png" for number in range(len(images))]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    given = {"texts": TEXTS[:4], "images": list(map(str, files)), "dtype": "fp32"}
    (tmp_path / "given.json").write_text(json.dumps(given))
    run = ["node", "embed.mjs", str(tmp_path) + "/", "given.json"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    texts, pixels = embedded(job, TEXTS[:4], images)
    np.testing.assert_allclose(found["texts"], texts, atol=1e-5)
    np.testing.assert_allclose(found["images"], pixels, atol=1e-4)


THEIRS = """
import sys, torch
from transformers import AutoTokenizer, CLIPModel
model, given = CLIPModel.from_pretrained(sys.argv[1]).eval(), torch.load(sys.argv[2])
ids = AutoTokenizer.from_pretrained(sys.argv[1])(given["texts"], padding=True, truncation=True, return_tensors="pt").input_ids
with torch.inference_mode():
    found = model(input_ids=ids, pixel_values=given["pixels"])
torch.save({"text": found.text_embeds, "image": found.image_embeds, "scale": model.logit_scale.detach().exp()}, sys.argv[3])
"""


@pytest.mark.oracle
@pytest.mark.skipif(
    not (oracles.FOLDER / "transformers").is_dir(), reason="needs transformers, which `make test` installs"
)
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_transformers_loads_its_folder_with_our_embeddings(job, tmp_path, quick_gelu):
    model = new_model({**tiny_architecture(layers=2), "quick_gelu": quick_gelu}, 1)
    artifact = save_artifact(artifact_from_model(model, ({"stage": "x", "hash": "abc"},), {}), tmp_path / "x")
    folder = write_layout("transformers", LayoutJob(job.exported, artifact), tmp_path / "hf")
    pixels = torch.randn(2, 3, 32, 32)
    torch.save({"texts": TEXTS, "pixels": pixels}, tmp_path / "given.pt")
    run = [sys.executable, "-c", THEIRS, folder, tmp_path / "given.pt", tmp_path / "found.pt"]
    done = subprocess.run(run, capture_output=True, text=True, env=oracles.ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "found.pt")
    ids = torch.from_numpy(job.exported.tokenize()(TEXTS))
    with torch.inference_mode():
        texts, images = model.module.encode_text(ids, normalize=True), model.module.encode_image(pixels, normalize=True)
    torch.testing.assert_close(found["text"], texts, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["image"], images, atol=1e-5, rtol=1e-5)
    assert float(found["scale"]) == pytest.approx(float(model.module.logit_scale.detach().exp()))
    again = import_checkpoint(folder)
    with torch.inference_mode():
        torch.testing.assert_close(again.module.encode_text(ids, normalize=True), texts, atol=1e-6, rtol=1e-6)


def cut(model):
    for part in anatomy.ffns(model.module):
        surgery.cut(part, surgery.FfnMask(torch.arange(128) % 2 == 0))


@pytest.mark.parametrize(
    ("text", "change", "reason"), [({"proj_bias": True}, id, "its config has proj_bias"), ({}, cut, "it is cut")]
)
def test_what_transformers_modules_cannot_hold_goes_out_as_onnx_and_says_why(
    job, tmp_path, caplog, text, change, reason
):
    architecture = tiny_architecture(layers=1)
    architecture["text_cfg"] |= text
    model = new_model(architecture, 0)
    change(model)
    artifact = save_artifact(artifact_from_model(model, ({"stage": "x", "hash": "abc"},), {}), tmp_path / "odd")
    folder = write_layout("transformers", LayoutJob(job.exported, artifact), tmp_path / "hf")
    assert f"odd is no CLIPModel, since {reason}. It is written as ONNX files." in caplog.text
    assert {path.name for path in (folder / "onnx").iterdir()} == {"vision_model.onnx", "text_model.onnx"}
    assert not (folder / "model.safetensors").exists()


def test_a_layout_is_written_beside_the_exports_and_an_unknown_one_is_refused_before_anything_is_exported(tiny_run):
    run, _ = tiny_run
    result = clipress("export", run, "--stage", "int8", "--layout", "transformers.js")
    assert result.exit_code == 0, result.output
    folder = run / "transformers.js" / "int8"
    assert (folder / "onnx" / "text_model_quantized.onnx").is_file() and (folder / "config.json").is_file()
    shutil.rmtree(run / "transformers.js")
    result = clipress("export", run, "--layout", "transformer.js")
    assert result.exit_code == 2 and "transformers.js" in result.output and "exported" not in result.output
