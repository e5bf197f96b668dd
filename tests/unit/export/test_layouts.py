"""Folders in the layouts of other programs: read as those programs read them, they embed as our export does."""

import json
import shutil

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
from helpers import clipress
from layout_jobs import TEXTS, embedded, exported_job, saved, two_images
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
from clipress.models.importers import siglip
from clipress.models.load import artifact_from_model, new_model
from clipress.models.tiny import tiny_architecture
from clipress.runtime.onnx_session import run_from_onnx


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return exported_job(tmp_path_factory.mktemp("layouts"))


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
    images = two_images()
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
    config = json.loads((folder.parent / "config.json").read_text())["transformers.js_config"]
    assert config == {"dtype": "fp32", "use_external_data_format": {names[0]: 1, names[2]: 1}}
    ids = {"input_ids": job.exported.tokenize()(TEXTS)}
    np.testing.assert_allclose(run_from_onnx(folder / names[0])(ids)["text_embeds"], embedded(job), atol=1e-5)


def test_an_unknown_layout_is_one_message(job, tmp_path):
    with pytest.raises(RecipeError, match=r"transformers\.js"):
        write_layout("transformer.js", job, tmp_path / "t")
    assert sorted(LAYOUTS) == ["immich", "open_clip", "transformers", "transformers.js", "web"]


TINY = tiny_architecture(layers=1)
HIDDEN = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIG = siglip.Config(vision_config={**HIDDEN, "image_size": 32}, text_config=HIDDEN)
SIGLIP = siglip.architecture(CONFIG, has_tokenizer=False)


def cut(model):
    for part in anatomy.ffns(model.module):
        surgery.cut(part, surgery.FfnMask(torch.arange(128) % 2 == 0))


@pytest.mark.parametrize(
    ("architecture", "change", "reason"),
    [
        ({**TINY, "text_cfg": {**TINY["text_cfg"], "proj_bias": True}}, id, "its config has proj_bias"),
        (TINY, cut, "it is cut"),
        (SIGLIP, cut, "it is cut"),
        ({**SIGLIP, "init_logit_bias": None}, id, "its config has act_kwargs, custom_text, hf_tokenizer_name"),
    ],
)
def test_what_transformers_modules_cannot_hold_goes_out_as_onnx_and_says_why(
    job, tmp_path, caplog, architecture, change, reason
):
    model = new_model(architecture, 0)
    change(model)
    artifact = saved(model, tmp_path / "odd")
    folder = write_layout("transformers", LayoutJob(job.exported, artifact), tmp_path / "hf")
    assert f"odd is no CLIPModel or SiglipModel, since {reason}" in caplog.text
    assert caplog.text.rstrip().endswith("It is written as ONNX files.")
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
