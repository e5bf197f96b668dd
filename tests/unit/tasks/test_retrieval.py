"""The retrieval task: a BLIP learns to embed and to match, is pruned, quantized, exported, and its files find the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from blip_stages import CUT, CUT_BY_UPOP, exported
from task_students import STUDENTS

from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.losses import Objective, terms_from
from clipress.compress.prune.gates import Gates
from clipress.compress.prune.search import Prune
from clipress.compress.prune.search import run as prune
from clipress.compress.quantize import Quantize
from clipress.compress.quantize import run as quantize
from clipress.compress.settings import Runtime, Training
from clipress.compress.teacher_cache import build_cache
from clipress.compress.train import train
from clipress.data.dataset import TrainingSet
from clipress.data.eval_sets import evalsets
from clipress.data.sampler import Draw
from clipress.data.spec import DataSpec, SourceSpec
from clipress.data.transforms import Augment, normalised
from clipress.errors import RecipeError
from clipress.metrics.outcomes import percent
from clipress.tasks import evaluate_model, runs_of, task_named
from clipress.tasks.retrieval import drawn, reranked_recalls
from clipress.tasks.training import Gather, TrainingJob

STUDENT = {**STUDENTS["retrieval"], "dropout": 0, "vocabulary": {"format": "scenes"}}
FEW = SourceSpec(format="scenes", limit=32)
SETS = evalsets([SourceSpec(format="scenes", limit=32, candidates=8)])
TASK = task_named("retrieval")
LOSSES = ("contrastive", "matching")


@pytest.fixture(scope="module")
def context():
    return Context(start_fabric(Runtime(accelerator="cpu")), DataSpec(train=(FEW,)), 0, title="t")


@pytest.fixture(scope="module")
def trained(context):
    model = TASK.student_from(STUDENT, None, 0)
    train(model, Training(steps=150, batch_size=16, lr=3e-3, weight_decay=0), LOSSES, context)
    return model


def lesson_of(model, needs=("pairs", "matches")):
    return TASK.lesson(TrainingJob("t", model, (), frozenset(needs), (), "both", (SETS[0].source,), False))


def batch_of(model, rows=6, groups=None):
    source = SETS[0].source
    pixels = torch.from_numpy(next(SETS[0].pixel_batches(model.preprocess, rows)))
    ids = torch.from_numpy(model.tokenize()([source.captions(i)[0] for i in range(rows)]))
    groups = torch.arange(rows) if groups is None else torch.tensor(groups)
    return {"pixels": pixels, "ids": ids, "group": groups, "label": torch.full((rows,), -1)}


def loss_of(model, arrays, name):
    lesson = lesson_of(model)
    outputs = lesson.module(model.module)(**lesson.inputs(arrays, None))
    batch = lesson.batch(outputs, (), arrays, {}, Gather(lambda rows: rows, local=True))
    return Objective(terms_from((name,), "t"), lesson.sizes)(batch)[0], batch


def test_it_learns_to_find_and_to_match(trained):
    scores = evaluate_model(trained, SETS)
    untrained = evaluate_model(TASK.student_from(STUDENT, None, 0), SETS)
    assert {"scenes/text_r1", "scenes/image_r1", "scenes/r_mean"} <= set(scores)
    assert percent(scores["scenes/r_mean"]) > 60 > percent(untrained["scenes/r_mean"]) + 10


def test_matching_tells_pairs_that_belong_together(context):
    model = TASK.student_from(STUDENT, None, 0)
    eight = replace(context, data=DataSpec(train=(SourceSpec(format="scenes", limit=8),)))
    train(model, Training(steps=200, batch_size=8, lr=3e-3, weight_decay=0), ("matching",), eight)
    arrays = batch_of(model, 8)
    with torch.no_grad():
        states = model.module.image(arrays["pixels"])
        right, wrong = (
            model.module.match(ids, ids != 0, states).softmax(-1)[:, 1]
            for ids in (arrays["ids"], arrays["ids"].roll(1, 0))
        )
    assert right.mean() > wrong.mean() + 0.3


def test_the_temperature_is_the_models_and_stays_in_blips_range(trained):
    model = trained.copy()
    _, batch = loss_of(model, batch_of(model), "contrastive")
    torch.testing.assert_close(batch.student.scale, 1 / model.module.temp.detach())
    lesson = lesson_of(model)
    for value, kept in ((1e-6, 0.001), (3.0, 0.5), (0.2, 0.2)):
        model.module.temp.data.fill_(value)
        lesson.keep_in_range(model.module)
        assert model.module.temp.item() == pytest.approx(kept)


def test_a_matching_loss_is_that_of_one_right_and_two_wrong_pairs(trained):
    model, arrays = trained.copy(), batch_of(trained, 2)  # of two, the wrong ones are known
    module, ids, pixels = model.module.eval(), arrays["ids"], arrays["pixels"]
    with torch.no_grad():
        loss, batch = loss_of(model, arrays, "matching")
        total = 0
        for row in range(2):
            for text, image, label in ((row, row, 1), (1 - row, row, 0), (row, 1 - row, 0)):
                own = ids[text : text + 1, ids[text] != 0]  # alone, without padding
                logits = module.match(own, None, module.image(pixels[image : image + 1]))
                total += F.cross_entropy(logits, torch.tensor([label]))
    torch.testing.assert_close(loss, total / 6)
    assert batch.student.matches.shape == (2, 3, 2) and (batch.match_weights == 1).all()


def test_pairs_of_the_same_image_are_never_wrong_ones(trained):
    model = trained.copy()
    similarities, groups = torch.randn(40, 40), torch.arange(40) // 4
    same = groups[:, None] == groups
    for _ in range(20):
        assert not same[torch.arange(40), drawn(30 * similarities, same)].any()
    with torch.no_grad():  # where all of a batch is one image, only the right pairs count
        loss, batch = loss_of(model, batch_of(model, 4, [7, 7, 7, 7]), "matching")
    assert batch.match_weights.tolist() == [[1, 0, 0]] * 4
    torch.testing.assert_close(loss, -batch.student.matches[:, 0].log_softmax(-1)[:, 1].mean())


def test_wrong_ones_are_drawn_by_their_similarity():
    torch.manual_seed(0)
    similarities = torch.tensor([[0.0, 1.0, 2.0]]).repeat(20_000, 1)
    same = torch.tensor([[True, False, False]]).repeat(20_000, 1)
    shares = torch.bincount(drawn(similarities, same), minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.2689, 0.7311]), atol=0.015, rtol=0)


def test_gradients_of_a_samples_three_pairs_are_its_own(trained):
    model = trained.copy()
    gates = Gates(model.module, "separate")
    arrays = batch_of(model, 4)
    torch.manual_seed(0)
    loss, _ = loss_of(model, arrays, "matching")
    loss.backward()
    text = [site for site in gates.sites if site.part.tower == "text"]
    assert text and all(len(site.gradient()) == 4 for site in gates.sites)
    gates.remove()


def test_a_queue_holds_what_the_momentum_model_says(trained):
    lesson, arrays = lesson_of(trained, ("pairs", "momentum")), batch_of(trained)
    gather = Gather(lambda rows: rows, local=True)
    with torch.no_grad():
        outputs = lesson.module(trained.module)(**lesson.inputs(arrays, None))
        batch = lesson.batch(outputs, (), arrays, {}, gather)
        other = {**outputs, "image": -outputs["image"], "text": -outputs["text"]}
        found, rows = lesson.momentum(other, batch, arrays, {}, gather, 0.4)
    torch.testing.assert_close(rows["image"], -batch.student.image)
    torch.testing.assert_close(rows["text"], -batch.student.text)
    torch.testing.assert_close(found.all_text, -batch.student.text)


def test_the_momentum_models_loss_trains_it(trained, context):
    settings = Training(steps=2, batch_size=8, queue_size=16, queue_start="random")
    assert np.isfinite(train(trained.copy(), settings, ("momentum-contrastive", "matching"), context)["last"]["loss"])


def test_every_caption_is_tokenized_once(trained):
    tokenize, seen = trained.tokenize(), []
    reranked_recalls(runs_of(trained), SETS[0], trained.preprocess, lambda texts: seen.extend(texts) or tokenize(texts))
    assert sorted(seen) == sorted(set(SETS[0].texts()[0]))


def test_reranking_the_whole_gallery_is_sorting_by_match_and_cosine(trained):
    runs = runs_of(trained)
    one = replace(SETS[0], candidates=32)
    found = reranked_recalls(runs, one, trained.preprocess, trained.tokenize())
    captions, owner = one.texts()
    with torch.no_grad():
        states = trained.module.image(torch.from_numpy(next(one.pixel_batches(trained.preprocess, 32))))
        ids = torch.from_numpy(trained.tokenize()(captions))
        texts, images = trained.module.text_embeds(ids, ids != 0), trained.module.image_embeds(states)
        match = torch.stack([
            trained.module.match(ids, ids != 0, row[None].expand(len(ids), -1, -1))[:, 1] for row in states
        ])  # fmt: skip
    scores = match + images @ texts.T
    hits = [int(scores[:, text].argmax()) == owner[text] for text in range(len(captions))]
    assert percent(found["image_r1"]) == pytest.approx(100 * np.mean(hits))


def test_it_is_cut_distilled_and_quantized_and_its_files_find_the_same(trained, context, tmp_path):
    context = replace(context, teachers=(trained,))
    model, details = prune(Prune(**CUT, losses=[*LOSSES, "affinity"], steps=10), trained.copy(), context)
    assert details["block_params_kept"] == pytest.approx(0.7, abs=0.05)
    train(model, Training(steps=20, batch_size=16, lr=1e-3), (*LOSSES, "affinity", "feature", "tokens"), context)
    found, wanted = found_twice(model, tmp_path / "fp32")
    assert found == wanted
    model, _ = quantize(Quantize(steps=2, batch_size=16, calibrate=32), model, context)
    assert any(".cross.0." in name for name in model.quantization["modules"])
    found, wanted = found_twice(model, tmp_path / "int8")
    assert found == pytest.approx(wanted, abs=12)


def found_twice(model, home):
    """Return the mean recall, by the files and in torch."""
    again, files = exported(model, SETS, home)
    assert set(files) == {"image", "text", "match"}
    for runs in (files, runs_of(again)):
        yield percent(reranked_recalls(runs, SETS[0], again.preprocess, again.tokenize())["r_mean"])


def test_upops_search_cuts_it(trained, context):
    settings = Prune(**CUT_BY_UPOP, losses=["momentum-contrastive", "matching"], steps=6)
    _, details = prune(settings, trained.copy(), context)
    assert 0.35 < details["block_params_kept"] < 0.75


def test_a_cached_teacher_says_what_one_that_runs_does(trained, context, tmp_path):
    source = SETS[0].source
    cache = build_cache(trained, source, Augment(), 1, tmp_path, teacher_hash="hash", say=lambda _: None)
    rows = TrainingSet([source], trained.preprocess, trained.tokenize(), Augment(), 0, [[cache]])
    arrays = rows.__getitems__([Draw(0, place, 0) for place in range(6)])
    lesson = lesson_of(trained, ("pairs", "teacher", "space"))
    tensors = {name: torch.from_numpy(found) for name, found in arrays.items() if name != "bad"}
    found = lesson.cached_outputs(tensors, 0, cache.manifest.logit_scale)
    pixels = torch.from_numpy(normalised(arrays["pixels"], trained.preprocess))
    with torch.no_grad():
        wanted = lesson.module(trained.module)(pixels, tensors["ids"], tensors["group"])
    for name in ("image", "text", "scale"):
        torch.testing.assert_close(found[name].float(), wanted[name], atol=2e-3, rtol=2e-3)


def test_labeled_images_are_classified_by_their_prompts(trained):
    assert set(evaluate_model(trained, evalsets([SourceSpec(format="digits", split="val", limit=8)]))) >= {
        "digits/top1"
    }


def test_data_without_texts_is_refused(trained, context):
    data = DataSpec(train=(SourceSpec(format="shapes", limit=16),))
    with pytest.raises(RecipeError, match="a BLIP requires images and texts"):
        train(trained.copy(), Training(steps=1, batch_size=4), LOSSES, replace(context, data=data))
