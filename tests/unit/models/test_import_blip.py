"""Files of BLIP and of UPop's compressed ones compute what their own code does."""

import pytest
import torch
from blip_reference import (
    DEC,
    EMBED,
    ENC,
    TASKS,
    VOCABULARY,
    Published,
    inputs,
    pixels,
    published,
    save,
    stored_twice,
    texts,
)
from helpers import clipress

from clipress.artifact import load_artifact
from clipress.errors import ArtifactError, RecipeError
from clipress.models import blip, surgery
from clipress.models.importers import artifact_from_checkpoint, detected, import_checkpoint
from clipress.models.load import rebuild
from clipress.models.weights_file import weights_from_file

UNUSED = {
    "text_encoder.embeddings.position_ids": torch.arange(24)[None],
    "visual_encoder.blocks.0.attn.alpha": torch.ones(1, 1, 1, 1, 64),
    "visual_encoder_m.cls_token": torch.ones(1, 1, 4),
    "text_encoder_m.embeddings.word_embeddings.weight": torch.ones(4, 4),
    "vision_proj_m.weight": torch.ones(4, 4),
    "text_proj_m.weight": torch.ones(4, 4),
    **{f"{name}_queue": torch.ones(1, 4) for name in ("image", "text", "idx", "ptr")},
}


def outputs(model, task):
    with torch.no_grad():
        return model.module(*inputs(task))


@pytest.mark.parametrize("slim", [False, True], ids=["dense", "slim"])
@pytest.mark.parametrize("task", TASKS)
def test_a_file_computes_what_its_own_code_does(tmp_path, task, slim):
    state = published(task, slim)
    path = save({**state, **UNUSED}, tmp_path)
    assert detected(weights_from_file(path, None).state) == "blip"
    model = import_checkpoint(path)
    wanted = getattr(Published(state), task)(*inputs(task))
    torch.testing.assert_close(outputs(model, task), wanted, atol=1e-5, rtol=1e-5)
    assert (model.task, model.preprocess.size, model.preprocess.resize_mode) == (task, 32, "squash")
    stock = surgery.shapes(model.module)
    scales = {one["scale"] for name, one in stock.items() if name.startswith("visual_encoder")}
    assert scales == {0.125}
    assert all(one["scale"] == one["qk_dim"] ** -0.5 for name, one in stock.items() if name.startswith("text"))


def test_the_tokenizer_beside_the_file_travels_with_the_model(tmp_path):
    path = save(published("retrieval"), tmp_path)
    artifact = artifact_from_checkpoint(path)
    model = rebuild(artifact, blip.build)
    ids = model.tokenize()(["A dog?", "dogs red"])
    assert ids.shape == (2, 24) and model.tokenizer["pad"] == 0  # 35 ids as published, but this one has 24 positions
    assert [row[row > 0].tolist() for row in ids] == [[2, 5, 6, 9, 3], [2, 6, 7, 8, 3]]
    assert "prompt" not in model.tokenizer
    torch.testing.assert_close(
        outputs(model, "retrieval"), outputs(import_checkpoint(path), "retrieval"), atol=0, rtol=0
    )
    (tmp_path / "vocab.txt").write_text((tmp_path / "vocab.txt").read_text().replace("dog", "cat"))
    assert artifact_from_checkpoint(path).hash != artifact.hash


def test_a_special_token_that_a_text_spells_out_is_letters(tmp_path):
    model = import_checkpoint(save(published("retrieval"), tmp_path))
    row = model.tokenize()(["a [SEP] dog [PAD] [CLS][MASK] [DEC] [ENC]"])[0]
    ids = row[row != 0].tolist()
    assert (ids[0], ids[1], ids[-1]) == (2, 5, 3) and 6 in ids
    assert not {0, 2, 3, 4, DEC, ENC} & set(ids[1:-1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (0, r"expected vocab\.txt of bert-base-uncased beside the file, found none"),
        (VOCABULARY - 3, r"expected 58 tokens and \[DEC\], \[ENC\] behind them, found 59 in all"),
        (VOCABULARY + 1, "expected 58 tokens .*found 63 in all"),
    ],
)
def test_another_vocabulary_is_refused(tmp_path, words, message):
    path = save(published("caption"), tmp_path, words)
    with pytest.raises(ArtifactError, match=message):
        import_checkpoint(path)


def test_two_images_start_from_a_file_for_one(tmp_path):
    state = published("retrieval", layers=8, width=64)
    model = import_checkpoint(save(state, tmp_path), model="nlvr")
    layers = model.module.text_encoder.layers
    assert [hasattr(layer, "merge") for layer in layers] == [False] * 6 + [True] * 2
    ids, mask = texts()
    states = Published(state).image(pixels())
    with torch.no_grad():
        for layer in layers[6:]:  # which average too, so that one image seen twice is one image
            layer.merge.weight.copy_(torch.cat([torch.eye(64)] * 2, 1) / 2)
            layer.merge.bias.zero_()
        found = model.module.text_encoder(ids, mask, (states, states))
    torch.testing.assert_close(
        found, Published(state).bert("text_encoder.", ids, mask, (states,)), atol=1e-5, rtol=1e-5
    )
    again = import_checkpoint(tmp_path / "blip.pth", model="nlvr").module.cls_head[0].weight
    assert torch.equal(again, model.module.cls_head[0].weight)


def test_a_pretrained_file_requires_its_task(tmp_path):
    parts = [published(task) for task in ("caption", "vqa", "retrieval")]
    pretrained = parts[0] | parts[1] | parts[2]
    path = save(pretrained, tmp_path)
    with pytest.raises(RecipeError, match="expected one of retrieval, nlvr, caption, vqa as the model name"):
        import_checkpoint(path)
    for task in ("retrieval", "caption", "vqa"):
        wanted = getattr(Published(pretrained), task)(*inputs(task))
        model = import_checkpoint(path, model=task)
        torch.testing.assert_close(outputs(model, task), wanted, atol=1e-5, rtol=1e-5)
        assert model.tokenizer.get("prompt") == ("a picture of " if task == "caption" else None)
    assert import_checkpoint(path, model="nlvr").task == "nlvr"


def test_the_command_line_imports_and_shows_it(tmp_path):
    path = save(published("nlvr", slim=True), tmp_path)
    done = clipress("import", path, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "blip (entry model)" in done.output and "tokenizer.json, 24 ids" in done.output
    assert "32 pixels, bicubic, squash; mean 0.4815, 0.4578, 0.4082" in done.output
    shown = clipress("show", tmp_path / "out")
    assert shown.exit_code == 0 and "text_encoder.layers.0.cross.1: 2 heads" in shown.output
    assert load_artifact(tmp_path / "out").task == "nlvr"


DECODER = "text_decoder.cls.predictions.decoder.weight"


@pytest.mark.parametrize(
    ("task", "change", "kind", "message"),
    [
        (
            "caption",
            {DECODER: torch.zeros(VOCABULARY, 128)},
            ArtifactError,
            "decoder.weight: expected the values that it",
        ),
        ("nlvr", {"text_encoder.extra": torch.zeros(4)}, ArtifactError, "1 tensors have no place.*text_encoder.extra"),
        (
            "retrieval",
            {"text_proj.bias": torch.zeros(5)},
            ArtifactError,
            rf"text_proj\.bias: expected .*\[{EMBED}\].*found .*\[5\]",
        ),
        (
            "vqa",
            {"text_encoder.encoder.layer.1.attention.self.query.weight": torch.zeros(33, 128)},
            ArtifactError,
            r"layers\.1\.attn\.q\.weight: expected rows of 2 equal heads, found 33",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, task, change, kind, message):
    state = published(task)
    save(state, tmp_path)
    torch.save({"model": {**state, **stored_twice(state), **change}}, tmp_path / "blip.pth")
    with pytest.raises(kind, match=message):
        import_checkpoint(tmp_path / "blip.pth")


def test_a_task_that_a_file_does_not_serve_is_refused(tmp_path):
    path = save(published("nlvr"), tmp_path)
    with pytest.raises(RecipeError, match="expected nlvr as the model name, found 'caption'"):
        import_checkpoint(path, model="caption")
