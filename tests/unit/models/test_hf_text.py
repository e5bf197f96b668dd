"""Text towers that open_clip takes from transformers: equal to its own, saved, loaded and exported without that library."""

import json

import open_clip
import pytest
import torch
from hf_text_oracle import CASES, VISION, config_of
from oracles import run_oracle

from clipress.artifact import save_artifact
from clipress.data.padding import TextEnd
from clipress.errors import ArtifactError, RecipeError
from clipress.export.settings import OnnxSettings
from clipress.export.torch_export import export_graph
from clipress.models import surgery
from clipress.models.hf_config import PUBLISHED, shape_of
from clipress.models.hf_text import CLS, NORM_AND_TWO
from clipress.models.importers import import_checkpoint
from clipress.models.load import artifact_from_model, build, model_from_open_clip, new_model, save_for_open_clip
from clipress.models.open_clip_config import config_named
from clipress.models.students import student_from
from clipress.models.text_length import text_end
from clipress.models.tiny import tiny_architecture
from clipress.runtime.onnx_session import reference_session, run_from_onnx
from clipress.tasks import graphs_of, model_from_artifact


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return run_oracle("hf_text_oracle.py", tmp_path_factory.mktemp("hf"))


def new(case):
    encoder, config = config_of(case)
    config["text_cfg"] = {**config["text_cfg"], "hf_config": encoder}
    return new_model(config, 0)


def texts(case, length=77):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 400, (3, length), generator=generator)
    ids[0, 5:] = config_of(case)[0]["pad_token_id"]
    return ids


@torch.no_grad()
def embedded(model, ids):
    return model.module.eval().encode_text(ids)


@pytest.mark.oracle
@pytest.mark.parametrize("case", CASES)
def test_a_hub_folder_computes_what_open_clip_does_with_transformers(theirs, case):
    model, expected = import_checkpoint(theirs / case), torch.load(theirs / case / "expected.pt", weights_only=True)
    torch.testing.assert_close(embedded(model, expected["ids"]), expected["text"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_it_is_saved_loaded_and_given_back(case, tmp_path):
    model, ids = new(case), texts(case)
    folder = save_artifact(artifact_from_model(model, ({"stage": "a", "hash": "a"},), {}), tmp_path / "a")
    again = model_from_artifact(folder)
    assert torch.equal(embedded(again, ids), embedded(model, ids))
    assert again.tokenizer["context_length"] == again.module.context_length == 77
    assert save_for_open_clip(model, tmp_path / "hub")
    assert torch.equal(embedded(import_checkpoint(tmp_path / "hub"), ids), embedded(model, ids))
    names = surgery.stock_weights(model.module).keys()
    assert not [name for name in names if "resblocks" in name and name.startswith("text.")]


@pytest.mark.parametrize("case", CASES)
def test_padding_has_no_influence(case):
    model, ids = new(case), texts(case)
    torch.testing.assert_close(embedded(model, ids[:1, :8]), embedded(model, ids[:1]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_checkpointing_changes_no_gradient(case):
    model, ids, found = new(case).module, texts(case), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model.encode_text(ids).square().sum().backward()
        found.append([p.grad.clone() for p in model.text.parameters() if p.grad is not None])
    assert found[0] and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_exported_at_its_context_length(case, exporter, tmp_path):
    model, ids = new(case), texts(case)
    graph = graphs_of(model)["text"]
    assert graph.inputs[0].shape == (77,)
    export_graph(model, graph, tmp_path / "text.onnx", OnnxSettings(exporter=exporter))
    found = run_from_onnx(tmp_path / "text.onnx")({"input_ids": ids.numpy()})["text_embeds"]
    wanted = torch.nn.functional.normalize(embedded(model, ids), dim=-1)
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-5, rtol=1e-5)


def test_altclips_projection_is_exported_and_given_to_no_open_clip(tmp_path):
    encoder, config = config_of("xlm-roberta")
    text = {"hf_pooler_type": CLS, "hf_proj_type": NORM_AND_TWO, "hf_config": {**encoder, "project_dim": 20}}
    model, ids = new_model({**config, "text_cfg": text}, 0), texts("xlm-roberta")
    export_graph(model, graphs_of(model)["text"], tmp_path / "text.onnx", OnnxSettings())
    found = run_from_onnx(tmp_path / "text.onnx")({"input_ids": ids.numpy()})["text_embeds"]
    wanted = torch.nn.functional.normalize(embedded(model, ids), dim=-1)
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-5, rtol=1e-5)
    assert not save_for_open_clip(model, tmp_path / "hub")


def test_every_encoder_that_open_clip_names_is_known():
    names = {open_clip.get_model_config(name)["text_cfg"].get("hf_model_name") for name in open_clip.list_models()}
    assert PUBLISHED.keys() == names - {None}
    for config in PUBLISHED.values():
        assert shape_of(config).head_dim == 64


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("roberta-ViT-B-32", 124.87),
        ("xlm-roberta-base-ViT-B-32", 278.27),
        ("xlm-roberta-large-ViT-H-14", 560.94),
        ("mt5-base-ViT-B-32", 277.86),
        ("mt5-xl-ViT-H-14", 1674.68),
        ("nllb-clip-base", 414.04),
        ("nllb-clip-large", 767.14),
        ("coca_roberta-ViT-B-32", 124.45),
    ],
)
def test_at_full_size_it_has_as_many_parameters_as_open_clip_publishes(name, millions):
    with torch.device("meta"):
        text = build({**config_named(name), "vision_cfg": VISION}).text
    assert round(sum(parameter.numel() for parameter in text.parameters()) / 1e6, 2) == millions


def test_a_name_of_open_clip_is_enough_for_a_random_teacher(tmp_path, monkeypatch):
    monkeypatch.setitem(PUBLISHED, "roberta-base", config_of("roberta")[0])
    (tmp_path / "small-roberta.json").write_text(
        '{"embed_dim": 24, "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}, '
        '"text_cfg": {"hf_model_name": "roberta-base", "hf_tokenizer_name": "roberta-base"}}'
    )
    open_clip.add_model_config(tmp_path / "small-roberta.json")
    model = model_from_open_clip("small-roberta", "random")
    assert model.architecture["text_cfg"]["hf_config"]["hidden_size"] == 32
    assert model.tokenizer["name"] == "roberta-base"


def test_a_student_can_have_the_text_tower_of_its_teacher():
    teacher, ids = new("xlm-roberta"), texts("xlm-roberta")
    image = {"width": 32, "layers": 1, "head_width": 16, "patch_size": 16}
    student = student_from({"image": image, "text": "teacher"}, teacher, 1)
    assert torch.equal(embedded(student, ids), embedded(teacher, ids))
    with pytest.raises(RecipeError, match="roberta-base, has a tokenizer of its own; the teacher's is 'clip-bpe'"):
        student_from({"model": "roberta-ViT-B-32"}, new_model(tiny_architecture(), 0), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "expected one of roberta, .*found model_type 'gpt2'"),
        ({"hidden_act": "silu"}, "expected the activation gelu, found 'silu'"),
        ({"num_hidden_layers": "many"}, "is not usable"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers: expected at most 256"),
        ({"num_attention_heads": 5}, "makes no sense: 5 heads, width 32"),
        ({"max_position_embeddings": 20}, "expected at least 79 positions for its texts, found 20"),
    ],
)
def test_another_encoder_is_refused(change, message, tmp_path):
    model = new("roberta")
    model.architecture["text_cfg"]["hf_config"] |= change
    folder = save_artifact(artifact_from_model(model, ({"stage": "a", "hash": "a"},), {}), tmp_path / "a")
    with pytest.raises(ArtifactError, match=message):
        model_from_artifact(folder)


TEXT = {"context_length": 8, "vocab_size": 500, "width": 32, "heads": 2, "layers": 1, "embed_cls": True}
POOL = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4}
DECODER = {"context_length": 8, "vocab_size": 500, "width": 24, "heads": 2, "layers": 1, "attn_pooler_heads": 2}


@pytest.fixture
def coca(tmp_path):
    """A CoCa as open_clip's hub folder, and the model."""
    towers = {"vision_cfg": {**VISION, **POOL, "output_tokens": True}, "text_cfg": {**TEXT, "output_tokens": True}}
    config = {"embed_dim": 24, "multimodal_cfg": DECODER, **towers}
    model = open_clip.CoCa(24, dict(DECODER), *(dict(towers[name]) for name in ("text_cfg", "vision_cfg"))).eval()
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**config, "custom_text": True}}))
    (tmp_path / "small-coca.json").write_text(json.dumps({**config, "custom_text": True}))
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    return tmp_path, model


def assert_same_towers(model, coca):
    pixels, ids = torch.randn(2, 3, 32, 32), torch.randint(1, 500, (2, 8))
    with torch.no_grad():
        for encode, rows in (("encode_image", pixels), ("encode_text", ids)):
            wanted, found = (getattr(one, encode)(rows, normalize=True) for one in (coca, model.module))
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_coca_keeps_the_towers_that_embed(coca, tmp_path, caplog):
    folder, theirs = coca
    model = import_checkpoint(folder)
    assert "decoder, which writes captions, is left out" in caplog.text
    assert_same_towers(model, theirs)
    assert save_for_open_clip(model, tmp_path / "hub")
    assert_same_towers(import_checkpoint(tmp_path / "hub"), theirs)
    assert isinstance(open_clip.create_model(f"local-dir:{tmp_path / 'hub'}"), open_clip.CustomTextCLIP)


def test_a_published_coca_is_read_from_its_file_with_the_preprocessing_of_its_tag(coca, monkeypatch):
    folder, theirs = coca
    open_clip.add_model_config(folder / "small-coca.json")
    published = {"url": "somewhere", "mean": (0.1, 0.2, 0.3), "interpolation": "bilinear"}
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: ["a-tag"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: published)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: str(folder / "open_clip_pytorch_model.bin"))
    model = model_from_open_clip("small-coca", "a-tag")
    assert_same_towers(model, theirs)
    assert model.preprocess.mean == (0.1, 0.2, 0.3) and model.preprocess.interpolation == "bilinear"
    assert_same_towers(model_from_open_clip("small-coca", str(folder / "open_clip_pytorch_model.bin")), theirs)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("case", CASES)
def test_padding_is_left_out_everywhere(case, exporter, tmp_path):
    model, pad = new(case), config_of(case)[0]["pad_token_id"]
    assert text_end(model.module) == TextEnd(pad=pad)
    ids = texts(case)[:1].repeat(2, 1)
    ids[1, 7:] = pad
    graph = graphs_of(model)["text"]
    assert graph.needed({"input_ids": ids.numpy()})["input_ids"].shape == (2, 8)
    export_graph(model, graph, tmp_path / "text.onnx", OnnxSettings(exporter=exporter))
    session = reference_session(tmp_path / "text.onnx")
    wanted = torch.nn.functional.normalize(embedded(model, ids), dim=-1)
    for length in (7, 8, 30, 77):
        (found,) = session.run(None, {"input_ids": ids[:, :length].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-6, rtol=1e-5)
