"""Folders of Hugging Face transformers: equal to its own outputs, with the folder's preprocessing; other models are refused."""

import json
import shutil

import open_clip
import pytest
import torch
from helpers import clipress
from oracles import run_oracle
from safetensors.torch import load_file, save_file
from sentence_oracle import SAVED, SENTENCES, image
from transformers_layout import exact_layout
from transformers_oracle import CASES, NAFLEX, SIGLIP, TEXTS, WORDED

from clipress.artifact import load_artifact
from clipress.data.bpe import SPECIAL, ClipBpe
from clipress.data.transforms import normalised
from clipress.errors import ArtifactError, RecipeError
from clipress.models import anatomy, surgery
from clipress.models.importers import artifact_from_checkpoint, import_checkpoint, siglip
from clipress.models.load import build, new_model, save_for_open_clip
from clipress.models.open_clip_config import config_named
from clipress.models.tiny import tiny_architecture
from clipress.tasks import model_from_artifact

PROCESSOR = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "resample": 2, "size": {"shortest_edge": 32}}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return run_oracle("transformers_oracle.py", tmp_path_factory.mktemp("transformers"))


@pytest.mark.oracle
@pytest.mark.parametrize("case", [*CASES, SIGLIP, NAFLEX, *WORDED])
def test_an_imported_folder_computes_what_transformers_does(theirs, case):
    model = import_checkpoint(theirs / case)
    expected = torch.load(theirs / case / "expected.pt", weights_only=True)
    pixels, ids = expected["inputs"]
    with torch.no_grad():
        found = model.module.encode_image(pixels), model.module.encode_text(ids)
    for rows, wanted in zip(found, expected["outputs"], strict=True):
        torch.testing.assert_close(rows, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.oracle
def test_a_naflex_siglip_is_taken_for_square_images_and_says_so(theirs, tmp_path):
    done = clipress("import", theirs / NAFLEX, tmp_path / "artifact")
    assert done.exit_code == 0, done.output
    assert "stretched to one square size, where NaFlex keeps an image's shape" in " ".join(done.output.split())
    preprocess = model_from_artifact(tmp_path / "artifact").preprocess
    assert (preprocess.size, preprocess.interpolation, preprocess.resize_mode) == (32, "bilinear", "squash")


@pytest.mark.oracle
def test_an_altclip_is_read_under_its_published_names_too(theirs, tmp_path):
    state = load_file(theirs / "altclip" / "model.safetensors")
    published = {
        name.replace("vision_model.encoder.layer.", "vision_model.encoder.layers."): state[name] for name in state
    }
    assert published.keys() != state.keys()
    shutil.copytree(theirs / "altclip", tmp_path / "published")
    save_file(published, tmp_path / "published" / "model.safetensors")
    pixels = torch.load(theirs / "altclip" / "expected.pt", weights_only=True)["inputs"][0]
    found = [import_checkpoint(folder).module for folder in (theirs / "altclip", tmp_path / "published")]
    with torch.no_grad():
        assert torch.equal(*(module.encode_image(pixels) for module in found))


@pytest.mark.oracle
@pytest.mark.parametrize("case", WORDED)
def test_the_tokenizer_of_a_folder_travels_with_the_model(theirs, case, tmp_path, monkeypatch):
    assert clipress("import", theirs / case, tmp_path / "artifact").exit_code == 0
    model = model_from_artifact(tmp_path / "artifact")
    expected = torch.load(theirs / case / "expected.pt", weights_only=True)
    monkeypatch.setattr("open_clip.tokenizer.HFTokenizer", None)  # Neither transformers nor the hub is used.
    ids = torch.from_numpy(model.tokenize()(TEXTS))
    assert torch.equal(ids, expected["inputs"][1])
    with torch.no_grad():
        torch.testing.assert_close(model.module.encode_text(ids), expected["outputs"][1], atol=1e-5, rtol=1e-5)


@pytest.mark.oracle
def test_an_imported_siglip_keeps_its_scale_bias_tokenizer_and_preprocessing_as_an_artifact(theirs, tmp_path):
    bare = import_checkpoint(theirs / SIGLIP)
    assert bare.preprocess.mean == (0.5, 0.5, 0.5) and bare.preprocess.resize_mode == "squash"
    (theirs / SIGLIP / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    assert clipress("import", theirs / SIGLIP, tmp_path / "artifact").exit_code == 0
    model = model_from_artifact(tmp_path / "artifact")
    state = load_file(theirs / SIGLIP / "model.safetensors")
    assert model.module.logit_scale == state["logit_scale"] and model.module.logit_bias == state["logit_bias"]
    assert model.preprocess.mean == (0.1, 0.2, 0.3) and model.preprocess.resize_mode == "squash"
    assert model.tokenizer["name"] == "timm/ViT-B-16-SigLIP"
    pixels, ids = torch.load(theirs / SIGLIP / "expected.pt", weights_only=True)["inputs"]
    with torch.no_grad():
        assert torch.equal(model.module.encode_image(pixels), bare.module.encode_image(pixels))
        assert torch.equal(model.module.encode_text(ids), bare.module.encode_text(ids))
    assert not save_for_open_clip(model, tmp_path / "open_clip")  # timm has no name for its image tower


HIDDEN = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2}


def small_siglip(changes=(), **act):
    vision = {**HIDDEN, "image_size": 32, "patch_size": 8, **act}
    text = {**HIDDEN, "max_position_embeddings": 16, **act}
    described = siglip.architecture(siglip.Config(vision_config=vision, text_config=text), has_tokenizer=False)
    for part, key, value in changes:
        (described[part] if part else described)[key] = value
    return new_model(described, 0)


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh"])
def test_a_siglip_under_their_names_is_read_back_as_it_was(act):
    model = small_siglip(hidden_act=act)
    config, stock = siglip.config_of(model.module), surgery.stock_weights(model.module)
    assert siglip.architecture(config, has_tokenizer=False) == model.architecture
    assert (config.vision_config.hidden_act, config.text_config.hidden_act) == (act, act)
    theirs = siglip.their_names(stock)
    assert all(name.startswith(("text_model.", "vision_model.", "logit_")) for name in theirs)
    again = siglip.renamed(theirs)
    assert again.keys() == stock.keys()
    assert all(torch.equal(again[name].reshape(tensor.shape), tensor) for name, tensor in stock.items())


@pytest.mark.parametrize(
    "change",
    [
        ("", "init_logit_bias", None),
        ("vision_cfg", "timm_pool", "avg"),
        ("text_cfg", "pool_type", "first"),
        ("text_cfg", "no_causal_mask", False),
        ("text_cfg", "proj_bias", False),
        ("text_cfg", "norm_kwargs", {"eps": 1e-5}),
    ],
)
def test_a_clip_that_differs_from_siglip_is_none(change):
    assert siglip.config_of(small_siglip([change]).module) is None


def test_a_siglip_may_have_any_vocabulary():
    """Its folder has its tokenizer; open_clip's are for SigLIP's own vocabularies."""
    assert siglip.config_of(small_siglip([("text_cfg", "vocab_size", 500)]).module).text_config.vocab_size == 500


def test_a_siglip_may_have_the_exact_gelu_in_one_tower_alone():
    config = siglip.config_of(small_siglip([("text_cfg", "act_kwargs", {})]).module)
    assert (config.vision_config.hidden_act, config.text_config.hidden_act) == ("gelu_pytorch_tanh", "gelu")


def test_a_cut_siglip_is_none():
    model = small_siglip()
    surgery.cut(anatomy.ffns(model.module)[0], surgery.FfnMask(torch.arange(80) % 2 == 0))
    assert siglip.config_of(model.module) is None


def test_every_siglip_of_open_clip_with_a_text_projection_is_one_of_theirs():
    names = [name for name in open_clip.list_models() if "SigLIP" in name]
    assert len(names) > 20
    for name in names:
        with torch.device("meta"):
            module = build(config_named(name))
        config = siglip.config_of(module)
        if module.text.text_projection is None:
            assert config is None
        else:
            assert config.vision_config.image_size == module.visual.image_size[0], name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"vocab_size": 500}, "expected a vocabulary that SigLIP was published with .*found 500"),
        ({"num_attention_heads": 7}, "7 heads do not divide a width of 768"),
        ({"hidden_act": "relu"}, "text_config.hidden_act"),
        ({}, r"tensor .* is missing"),
    ],
)
def test_a_siglip_that_does_not_fit_its_config_is_refused(folder, text, message):
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip", "text_config": text}))
    with pytest.raises(ArtifactError, match=message):
        import_checkpoint(folder)


@pytest.fixture
def stock():
    return new_model(tiny_architecture(), 0)


@pytest.fixture
def folder(stock, tmp_path):
    state, config = exact_layout(stock.module)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def assert_same(model, stock):
    pixels, ids = torch.randn(2, 3, 32, 32), torch.randint(1, 400, (2, 24))
    with torch.no_grad():
        for encode, rows in (("encode_image", pixels), ("encode_text", ids)):
            wanted, found = (getattr(one.module.eval(), encode)(rows) for one in (stock, model))
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_weights_in_its_layout_are_the_same_model(folder, stock):
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    result = clipress("import", folder, folder / "artifact")
    assert result.exit_code == 0 and ": transformers, " in result.output
    assert "activation: GELU" in result.output and "tokenizer: clip-bpe, 24 ids" in result.output
    assert (
        "preprocessing, from preprocessor_config.json: 32 pixels, bilinear, shortest; mean 0.1, 0.2, 0.3; std 0.5, 0.6, 0.7"
        in result.output
    )
    artifact = load_artifact(folder / "artifact")
    assert artifact.preprocess["mean"] == [0.1, 0.2, 0.3] and artifact.preprocess["interpolation"] == "bilinear"
    assert artifact.tokenizer["name"] == "clip-bpe"
    assert_same(import_checkpoint(folder), stock)


def test_the_margin_that_a_processor_crops_is_cropped(folder):
    sizes = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **sizes}))
    result = clipress("import", folder, folder / "artifact")
    assert "32 pixels, bilinear, shortest, crop_pct 0.8;" in result.output
    assert model_from_artifact(folder / "artifact").preprocess.short_side == 40


def test_shards_are_read_together(folder, stock):
    state = dict(exact_layout(stock.module)[0])
    (folder / "model.safetensors").unlink()
    names, half = sorted(state), len(state) // 2
    for number, part in enumerate((names[:half], names[half:])):
        save_file({name: state[name] for name in part}, folder / f"model-{number}.safetensors")
    places = {name: f"model-{int(number >= half)}.safetensors" for number, name in enumerate(names)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_same(import_checkpoint(folder), stock)
    assert artifact_from_checkpoint(folder).lineage[0]["file"] == "model-0.safetensors, model-1.safetensors"
    index.write_text(json.dumps({"weight_map": {"a": "../model-0.safetensors"}}))
    with pytest.raises(ArtifactError, match="names files outside the folder"):
        import_checkpoint(folder)


@pytest.mark.oracle
@pytest.mark.parametrize("inside", [".", "0_CLIPModel"])  # where version 6 puts a CLIP, and where versions before did
def test_a_sentence_transformers_folder_encodes_what_that_library_does(inside, tmp_path):
    saved = run_oracle("sentence_oracle.py", tmp_path, "sentence_transformers") / SAVED
    (tmp_path / "home").mkdir()
    shutil.copytree(saved, tmp_path / "home" / inside, dirs_exist_ok=True)
    model = import_checkpoint(tmp_path / "home")
    assert model.preprocess.mean == (0.1, 0.2, 0.3)
    pixels, ids = normalised(image()[None], model.preprocess), model.tokenize()(SENTENCES)
    with torch.no_grad():
        found = model.module.encode_image(torch.from_numpy(pixels)), model.module.encode_text(torch.from_numpy(ids))
    for rows, wanted in zip(found, torch.load(saved / "expected.pt", weights_only=True), strict=True):
        torch.testing.assert_close(rows, wanted, atol=1e-5, rtol=1e-5)


def test_a_sentence_transformers_folder_has_its_clip_inside(folder, stock, tmp_path):
    home = tmp_path / "sentence"
    home.mkdir()
    folder.joinpath("modules.json").write_text("[]")
    inside = home / "0_CLIPModel"
    inside.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(inside / name)
    assert_same(import_checkpoint(home), stock)


def test_a_tokenizer_that_is_not_clips_is_refused(folder, stock):
    there = dict(zip(SPECIAL, ("<|startoftext|>", "<|endoftext|>"), strict=True))
    vocabulary = {there.get(token, token): number for token, number in ClipBpe().token_ids.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    assert_same(import_checkpoint(folder), stock)
    (folder / "vocab.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(ArtifactError, match=r"vocab\.json is not CLIP's vocabulary of 49,408 tokens"):
        import_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "blip"}, "found 'blip', which is not read yet"),
        ({"model_type": "siglip2", "vision_config": {"num_patches": 255}}, "expected a square number, found 255"),
        ({"model_type": "siglip2", "vision_config": {"num_patches": "many"}}, "expected num_patches .*, found 'many'"),
        ({"vision_config": {"num_attention_heads": 7}}, "7 heads do not divide"),
        ({"vision_config": {"hidden_act": "silu"}}, "vision_config.hidden_act"),
        ({"text_config": {"hidden_act": "quick_gelu"}}, "different activations"),
        ({"text_config": {"num_hidden_layers": 3}}, r"transformer\.resblocks\.2.* is missing"),
    ],
)
def test_a_folder_of_another_model_is_refused(folder, change, message):
    config = json.loads((folder / "config.json").read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=message):
        import_checkpoint(folder)


@pytest.mark.parametrize("form", ["auto", "transformers"])
def test_its_weights_are_read_with_the_config_beside_them(folder, stock, form):
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    model = import_checkpoint(folder / "model.safetensors", form)
    assert_same(model, stock)
    assert model.preprocess.mean == (0.1, 0.2, 0.3)
    made = artifact_from_checkpoint(folder / "model.safetensors")
    assert made.lineage[0]["preprocess"] == "from preprocessor_config.json"
    assert made.hash == artifact_from_checkpoint(folder).hash


def test_its_weights_without_their_folder_are_refused_with_what_is_needed(folder):
    shutil.copy(folder / "model.safetensors", folder / "alone.safetensors")
    with pytest.raises(ArtifactError, match=r"Import the folder that also holds config\.json"):
        import_checkpoint(folder / "alone.safetensors")
    with pytest.raises(RecipeError, match="format 'upop' has no folders"):
        import_checkpoint(folder, "upop")
    with pytest.raises(RecipeError, match="expected no model name, found 'ViT-B-32'"):
        import_checkpoint(folder, model="ViT-B-32")
