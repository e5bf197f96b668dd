"""Layouts read by transformers itself: models, processors and pipelines embed as our export does, whatever the tokenizer."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from layout_jobs import TEXTS, exported_job, saved, two_images
from layouts_oracle import CASES, TOKENIZERS
from layouts_oracle import TEXTS as OTHER_TEXTS
from oracles import run_oracle
from tokenizers import Tokenizer, models, pre_tokenizers

from clipress.data.transforms import Preprocess, fitted, normalised
from clipress.errors import ArtifactError, BackendMissing, ExportError
from clipress.export.layouts import LayoutJob, write_layout
from clipress.models.importers import import_checkpoint
from clipress.models.load import new_model
from clipress.models.tiny import tiny_architecture
from clipress.runtime.onnx_session import run_from_onnx
from clipress.tasks import model_from_artifact

SIGLIPS = [case for case in CASES if case.startswith("siglip")]
LABELS = ["a photo of a cat", "a dog", "naïve café"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return exported_job(tmp_path_factory.mktemp("layouts"))


def read(folder, texts, home):
    """Return what transformers makes of a folder, of these texts and of the first image."""
    two_images()[0].save(home / "image.png")
    torch.save({"texts": texts, "image": str(home / "image.png"), "labels": LABELS}, home / "given.pt")
    run_oracle("transformers_reads.py", folder, home / "given.pt", home / "found.pt")
    return torch.load(home / "found.pt")


def close(found, wanted):
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(wanted), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def ours(model, tokenize, texts):
    """Return our embeddings of texts and of the first image, the pixels, and the logits of the labels."""
    pixels = torch.from_numpy(normalised(fitted(two_images()[0], model.preprocess)[None], model.preprocess))
    module, ids = model.module.eval(), torch.from_numpy(tokenize(texts))
    rows, labels = (module.encode_text(one, normalize=True) for one in (ids, torch.from_numpy(tokenize(LABELS))))
    image, bias = module.encode_image(pixels, normalize=True), getattr(module, "logit_bias", None)
    logits = module.logit_scale.exp() * image @ labels.T + (0 if bias is None else bias)
    return {"texts": rows, "image": image, "pixels": pixels, "logits": logits[0]}


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("quick_gelu", "mode", "texts"),
    [(False, "shortest", TEXTS[:4]), (True, "squash", TEXTS)],  # whose longest does not fill the context, or does
)
def test_a_clip_model_embeds_as_ours_does_whatever_the_padding(job, tmp_path, quick_gelu, mode, texts):
    model = new_model({**tiny_architecture(layers=2), "quick_gelu": quick_gelu}, 1)
    model = replace(model, preprocess=Preprocess(size=32, resize_mode=mode))
    folder = write_layout("transformers", LayoutJob(job.exported, saved(model, tmp_path / "x")), tmp_path / "hf")
    found, wanted = read(folder, texts, tmp_path), ours(model, job.exported.tokenize(), texts)
    assert (found["class"], found["processor"]) == ("CLIPModel", "CLIPProcessor")
    for padding in (True, "max_length"):
        close(found["texts"][padding], wanted["texts"])
    close(found["pixels"], wanted["pixels"])
    close(found["images"], wanted["image"])
    close([found["scores"][label] for label in LABELS], wanted["logits"].softmax(0))
    again = import_checkpoint(folder)
    with torch.inference_mode():
        ids = torch.from_numpy(job.exported.tokenize()(TEXTS))
        close(again.module.encode_text(ids, normalize=True), model.module.encode_text(ids, normalize=True))


@pytest.mark.oracle
def test_the_margin_that_a_model_crops_is_cropped_there_too(job, tmp_path):
    model = new_model(tiny_architecture(layers=1), 1)
    model = replace(model, preprocess=Preprocess(size=32, crop_pct=0.8))
    folder = write_layout("transformers", LayoutJob(job.exported, saved(model, tmp_path / "x")), tmp_path / "hf")
    found, wanted = read(folder, TEXTS, tmp_path)["pixels"], ours(model, job.exported.tokenize(), TEXTS)["pixels"]
    level = 1 / 255 / min(model.preprocess.std)  # transformers resizes with torchvision, which rounds some values apart
    torch.testing.assert_close(torch.as_tensor(found), wanted, rtol=0, atol=1.01 * level)
    assert import_checkpoint(folder).preprocess == model.preprocess


@pytest.mark.oracle
@pytest.mark.parametrize("case", SIGLIPS)
def test_a_siglip_model_embeds_as_ours_does_and_comes_back_the_same(others, tmp_path, case):
    home, model = others / case, model_from_artifact(others / case / "x")
    found, expected = read(home / "transformers", OTHER_TEXTS, tmp_path), np.load(home / "expected.npz")
    assert (found["class"], found["processor"]) == ("SiglipModel", "SiglipProcessor")
    tokenize = Tokenizer.from_file(str(home / "transformers" / "tokenizer.json"))
    wanted = ours(model, lambda texts: np.array([one.ids for one in tokenize.encode_batch(texts)]), OTHER_TEXTS)
    assert np.array_equal(found["ids"], expected["ids"])
    close(found["texts"]["max_length"], wanted["texts"])
    close(found["texts"]["max_length"], expected["texts"])
    close(found["pixels"], wanted["pixels"])
    close(found["images"], wanted["image"])
    close([found["scores"][label] for label in LABELS], wanted["logits"].sigmoid())
    again = import_checkpoint(home / "transformers")
    assert np.array_equal(again.tokenize()(OTHER_TEXTS), expected["ids"])  # by the folder's own tokenizer.json
    text = {**model.architecture["text_cfg"], "hf_tokenizer_name": "tokenizer.json"}
    assert (again.architecture, again.preprocess) == ({**model.architecture, "text_cfg": text}, model.preprocess)
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], tensor), name


@pytest.mark.oracle
@pytest.mark.parametrize("layout", ["transformers.js", "immich"])
@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_layout_has_the_ids_of_a_tokenizer_of_transformers(others, tmp_path, case, layout):
    home, expected = others / case, np.load(others / case / "expected.npz")
    folder = home / layout
    place = folder / "textual" if layout == "immich" else folder
    found = Tokenizer.from_file(str(place / "tokenizer.json"))
    for text, wanted in zip(OTHER_TEXTS, expected["ids"], strict=True):
        ids = found.encode(text).ids
        assert ids == wanted[: len(ids)].tolist() and len(set(wanted[len(ids) :])) <= 1
    ids = np.array([one.ids for one in found.encode_batch(OTHER_TEXTS)])
    assert np.array_equal(ids, expected["ids"])  # of which one fills the context
    if layout == "immich":
        run, given = run_from_onnx(folder / "textual" / "model.onnx"), {"text": ids.astype(np.int32)}
    else:
        assert np.array_equal(read(folder, OTHER_TEXTS, tmp_path)["ids"], ids)
        run, given = run_from_onnx(folder / "onnx" / "text_model.onnx"), {"input_ids": ids}
    close(run(given)["text_embeds"], expected["texts"])


@pytest.mark.parametrize("layout", ["transformers", "transformers.js", "immich"])
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ModuleNotFoundError(name="transformers"), BackendMissing, "'a/b' requires transformers. Run: pip install"),
        (OSError("no such repository"), ArtifactError, "Tokenizer 'a/b' cannot be built .*no such repository"),
    ],
)
def test_a_tokenizer_whose_files_are_not_there_is_one_message(job, tmp_path, monkeypatch, layout, error, kind, message):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("open_clip.tokenizer.HFTokenizer", fails)
    with pytest.raises(kind, match=message):
        write_layout(layout, with_tokenizer(job, name="a/b"), tmp_path / "t")
    assert not (tmp_path / "t").exists()


def with_tokenizer(job, **changes):
    tokenizer = job.exported.tokenizer.model_copy(update=changes)
    return LayoutJob(job.exported.model_copy(update={"tokenizer": tokenizer}), job.artifact)


class Theirs:
    """open_clip's HFTokenizer with an inner tokenizer, giving these ids."""

    def __init__(self, inner, ids):
        self.tokenizer, self.ids = inner, ids

    def __call__(self, texts, context_length):
        return torch.full((len(texts), context_length), self.ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b", "kwargs": {"strip_sep_token": True}}, "tokenizer 'a/b' with the settings strip_sep_token"),
        ({"kwargs": {"clean": "canonicalize"}}, "tokenizer 'clip-bpe' with the settings clean"),
    ],
)
def test_settings_that_tokenizer_json_cannot_say_are_refused(job, tmp_path, changes, message):
    with pytest.raises(ExportError, match=message):
        write_layout("transformers.js", with_tokenizer(job, **changes), tmp_path / "t")


@pytest.mark.oracle
@pytest.mark.parametrize(("bias", "mode"), [(None, "shortest"), (-3.0, "shortest"), (-3.0, "squash")])
def test_optimum_reads_the_joint_file_and_each_encoder(tmp_path, bias, mode):
    model = new_model({**tiny_architecture(layers=1), "init_logit_bias": bias}, 0)
    model = replace(model, preprocess=Preprocess(size=32, resize_mode=mode))
    job = exported_job(tmp_path, model, joint=True)
    folder, wanted = write_layout("transformers.js", job, tmp_path / "t"), ours(model, job.exported.tokenize(), LABELS)
    two_images()[0].save(tmp_path / "image.png")
    torch.save({"texts": LABELS, "image": str(tmp_path / "image.png")}, tmp_path / "given.pt")
    run_oracle("optimum_reads.py", folder, tmp_path / "given.pt", tmp_path / "found.pt", library="optimum")
    found = torch.load(tmp_path / "found.pt")
    for texts, images in zip(found["texts"], found["images"], strict=True):
        close(texts, wanted["texts"])
        close(images, wanted["image"])
    per_image, per_text = found["logits"]
    torch.testing.assert_close(per_image[0], wanted["logits"], atol=1e-4, rtol=1e-4)
    assert torch.equal(per_text, per_image.T)


def test_a_tokenizer_without_a_tokenizer_json_or_with_other_ids_in_it_is_refused(job, tmp_path, monkeypatch):
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "a": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = SimpleNamespace(backend_tokenizer=backend, pad_token_id=1, pad_token="[PAD]", padding_side="right")
    for inner, message in (
        (SimpleNamespace(), "expected a fast tokenizer 'a/b', found SimpleNamespace"),
        (fast, "Tokenizer 'a/b' gives other ids .* first for 'a photo of a cat'"),
    ):
        monkeypatch.setattr("open_clip.tokenizer.HFTokenizer", lambda *_, inner=inner, **__: Theirs(inner, 7))
        with pytest.raises(ExportError, match=message):
            write_layout("transformers.js", with_tokenizer(job, name="a/b"), tmp_path / "t")
