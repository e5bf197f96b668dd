"""What a BLIP's files say with ONNX Runtime is what its evaluation finds in torch."""

import io
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from blip_exports import DATA, images_of, set_of, texts_of
from PIL import Image
from small_exports import write_classifier, write_export, write_segmenter

from clipress.data.spec import BeamSearch
from clipress.errors import DataError, ExportError
from clipress.metrics.retrieval import retrieval
from clipress.serve.classify import LoadedModel
from clipress.tasks import evaluate_model, runs_of
from clipress.tasks.blip import pieces_of
from clipress.tasks.caption import captions_of
from clipress.tasks.nlvr import logits_of
from clipress.tasks.vqa import answers_of


@pytest.fixture(scope="module")
def blip(blip_exports):
    """Return every task's loaded export and its model in torch."""
    return {task: (LoadedModel(export, threads=1), model) for task, (export, model) in blip_exports.items()}


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_are_those_of_the_evaluation(blip, beams):
    loaded, model = blip["caption"]
    one = replace(set_of("caption"), beam_search=BeamSearch(beams=beams))
    expected = captions_of(runs_of(model), one, model.preprocess, pieces_of(model.tokenize()))
    assert loaded.caption(images_of("caption"), beams) == expected
    assert len(set(expected)) > 2


def test_images_may_be_files_bytes_and_arrays(blip, tmp_path):
    loaded, (pixels, *_) = blip["caption"][0], images_of("caption")
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    given = [np.asarray(pixels), Image.fromarray(np.asarray(pixels)), file.getvalue(), tmp_path / "a.png"]
    (text,) = loaded.caption(pixels)
    assert loaded.caption(given) == [text] * 4 and loaded.caption([]) == []


def test_answers_are_chosen_or_written_as_in_the_evaluation(blip):
    loaded, model = blip["vqa"]
    one, run = set_of("vqa"), runs_of(model)
    given = images_of("vqa"), texts_of("vqa")
    chosen = answers_of(run, one, model.preprocess, model.tokenize())
    assert loaded.answer(*given, one.source.candidates) == chosen and len(set(chosen)) > 2
    written = answers_of(run, replace(one, beam_search=BeamSearch()), model.preprocess, model.tokenize())
    assert loaded.answer(*given) == written and len(set(written)) > 2
    assert loaded.answer(given[0][0], given[1][:2], ["red", "blue"]) == [
        loaded.answer(given[0][0], question, ["red", "blue"])[0] for question in given[1][:2]
    ]
    assert loaded.answer([], [], ["red"]) == []


def test_statements_have_the_probabilities_of_the_evaluation(blip):
    loaded, model = blip["nlvr"]
    one = set_of("nlvr")
    others = [one.source.other_image(place) for place in range(len(one.source))]
    logits = torch.from_numpy(logits_of(runs_of(model), one, model.preprocess, model.tokenize()))
    found = loaded.judge(images_of("nlvr"), others, texts_of("nlvr"))
    np.testing.assert_allclose(found, logits.softmax(1)[:, 1], atol=1e-4)
    assert found.std() > 0.01 and found.dtype == np.float32
    assert loaded.judge([], [], []).shape == (0,)


def of_pairs(model):
    """Return the embeddings of a set's images and texts in torch, and the match logits of all pairs [T, N, 2]."""
    pixels = torch.from_numpy(next(set_of("retrieval").pixel_batches(model.preprocess)))
    ids = torch.from_numpy(model.tokenize()(texts_of("retrieval")))
    module = model.module.eval()
    with torch.no_grad():
        states, mask = module.image(pixels), ids != 0
        rows = [module.match(ids[[place]].expand(len(pixels), -1), mask[[place]], states) for place in range(len(ids))]
        return module.image_embeds(states).numpy(), module.text_embeds(ids, mask).numpy(), torch.stack(rows)


def test_pairs_have_the_probabilities_that_torch_computes(blip):
    loaded, model = blip["retrieval"]
    expected = of_pairs(model)[2].softmax(-1)[:, :, 1].numpy()
    found = loaded.match(images_of("retrieval"), texts_of("retrieval"))
    np.testing.assert_allclose(found, np.diagonal(expected), atol=1e-4)
    np.testing.assert_allclose(loaded.match(images_of("retrieval"), texts_of("retrieval")[0]), expected[0], atol=1e-4)
    assert expected.std() > 0.01


@pytest.mark.parametrize("candidates", [1, 5, 128])
def test_images_are_ranked_as_the_evaluation_ranks_them(blip, candidates):
    loaded, model = blip["retrieval"]
    images, texts, logits = of_pairs(model)
    scores = loaded.rank(images_of("retrieval"), texts_of("retrieval"), candidates)
    for text, row in enumerate(texts @ images.T):
        near = np.argsort(-row)
        head, behind = near[:candidates], near[candidates:]
        np.testing.assert_allclose(scores[text, head], row[head] + logits[text, head, 1].numpy(), atol=1e-4)
        assert (scores[text, behind] < scores[text, head].min()).all()
        np.testing.assert_allclose(np.diff(scores[text, behind]), np.diff(row[behind]), atol=1e-5)
    (figure,) = [
        outcomes
        for name, outcomes in evaluate_model(model, [replace(set_of("retrieval"), candidates=candidates)]).items()
        if name.endswith("image_r1")
    ]
    captions, owner = set_of("retrieval").texts()
    best = loaded.rank(images_of("retrieval"), captions, candidates).argmax(1)
    np.testing.assert_array_equal(figure.values > 0, best == owner)
    plain = retrieval(images, texts, np.arange(len(texts)))
    assert candidates != 128 or not np.array_equal(plain["image_r1"].values, best == owner)


def test_a_retrieval_blip_embeds_and_classifies_as_a_clip_does(blip):
    loaded, model = blip["retrieval"]
    images, texts, _ = of_pairs(model)
    np.testing.assert_allclose(loaded.encode_image(images_of("retrieval")), images, atol=1e-5)
    np.testing.assert_allclose(loaded.encode_text(texts_of("retrieval")), texts, atol=1e-5)
    labels = ["red", "blue", "a circle"]
    with torch.no_grad():
        ids = torch.from_numpy(model.tokenize()(labels))
        classes = model.module.text_embeds(ids, ids != 0)
        expected = (torch.from_numpy(images) @ classes.T / model.module.temp).softmax(1)
    np.testing.assert_allclose(loaded.classify(images_of("retrieval"), labels, "{}"), expected, atol=1e-4)


CALLS = {
    "caption": lambda model: model.caption(b""),
    "vqa": lambda model: model.answer(b"", "?"),
    "nlvr": lambda model: model.judge(b"", b"", "."),
    "retrieval": lambda model: model.match(b"", "."),
}
USES = {
    "caption": "writes captions of images",
    "vqa": "answers questions about images",
    "nlvr": "judges statements about two images",
    "retrieval": "finds images for texts and texts for images",
}


@pytest.mark.parametrize("task", DATA)
def test_a_method_of_another_model_says_what_this_one_is_for(blip, task, tmp_path):
    loaded = blip[task][0]
    for other in DATA.keys() - {task}:
        with pytest.raises(ExportError, match=f"a model that {USES[other]}, found one that {USES[task]}"):
            CALLS[other](loaded)
    with pytest.raises(ExportError, match=f"expected a Segmenter, found a model that {USES[task]}"):
        loaded.segment(b"")
    with pytest.raises(ExportError, match=f"{USES[task]}, found one that finds its labels at every pixel"):
        CALLS[task](LoadedModel(write_segmenter(tmp_path / "segmenter")))
    with pytest.raises(ExportError, match=f"{USES[task]}, found one that classifies images"):
        CALLS[task](LoadedModel(write_classifier(tmp_path / "classifier")))
    with pytest.raises(ExportError, match=f"{USES[task]}, found one that embeds images and texts"):
        CALLS[task](LoadedModel(write_export(tmp_path / "clip")))
    with pytest.raises(DataError, match="not a readable image"):
        CALLS[task](loaded)


@pytest.mark.parametrize("task", ["caption", "vqa", "nlvr"])
def test_states_are_no_embeddings(blip, task):
    for call in (blip[task][0].encode_image, lambda image: blip[task][0].classify(image, ["cat", "dog"])):
        with pytest.raises(ExportError, match=f"gives embeddings, found a model that {USES[task]}"):
            call(b"")


def test_counts_that_do_not_fit_and_empty_lists_are_refused(blip):
    image = images_of("vqa")[0]
    with pytest.raises(DataError, match="as many of each, or one for all, found 3 images, 2 questions"):
        blip["vqa"][0].answer([image] * 3, ["?", "!"])
    with pytest.raises(DataError, match="found 2 firsts, 3 seconds, 1 statements"):
        blip["nlvr"][0].judge([image] * 2, [image] * 3, "red")
    with pytest.raises(DataError, match="expected at least 1 candidate"):
        blip["vqa"][0].answer(image, "?", [])
    with pytest.raises(DataError, match="expected at least 1 beam"):
        blip["caption"][0].caption(image, beams=0)
    for texts, candidates in (([], 5), (["red"], 0)):
        with pytest.raises(DataError, match="expected a text and at least 1 candidate"):
            blip["retrieval"][0].rank([image], texts, candidates)
    assert blip["retrieval"][0].rank([], ["red", "blue"]).shape == (2, 0)


def test_nothing_of_it_imports_torch(blip):
    calls = {task: blip[task][0].exported.folder for task in DATA}
    code = (
        "import sys, clipress, numpy\n"
        "image = numpy.zeros((8, 8, 3), numpy.uint8)\n"
        f"clipress.load({str(calls['caption'])!r}).caption(image)\n"
        f"clipress.load({str(calls['vqa'])!r}).answer(image, '?', ['a', 'b'])\n"
        f"clipress.load({str(calls['nlvr'])!r}).judge(image, image, 'a')\n"
        f"clipress.load({str(calls['retrieval'])!r}).rank([image], 'a')\n"
        "assert not {'torch', 'open_clip', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
