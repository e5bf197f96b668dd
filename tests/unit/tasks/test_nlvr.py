"""The nlvr task: a BLIP learns to judge statements about two images, is pruned, quantized, exported, and its files judge the same."""

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
from clipress.compress.prune.search import Prune
from clipress.compress.prune.search import run as prune
from clipress.compress.quantize import Quantize
from clipress.compress.quantize import run as quantize
from clipress.compress.settings import Runtime, Training
from clipress.compress.train import train
from clipress.data.bad_records import Record
from clipress.data.dataset import exchanged
from clipress.data.eval_sets import evalsets
from clipress.data.spec import DataSpec, SourceSpec
from clipress.errors import RecipeError
from clipress.metrics.outcomes import percent
from clipress.tasks import evaluate_model, runs_of, task_named
from clipress.tasks.nlvr import logits_of
from clipress.tasks.training import Gather, TrainingJob

STUDENT = {**STUDENTS["nlvr"], "dropout": 0, "vocabulary": {"format": "statements"}}
FEW = SourceSpec(format="statements", limit=48)
SETS = evalsets([FEW])
TASK = task_named("nlvr")


@pytest.fixture(scope="module")
def context():
    return Context(start_fabric(Runtime(accelerator="cpu")), DataSpec(train=(FEW,)), 0, title="t")


@pytest.fixture(scope="module")
def trained(context):
    model = TASK.student_from(STUDENT, None, 0)
    train(model, Training(steps=250, batch_size=16, lr=3e-3, weight_decay=0), ("classification",), context)
    return model


def judged(runs, model):
    return logits_of(runs, SETS[0], model.preprocess, model.tokenize())


def test_it_learns_statements_by_heart(trained):
    scores = evaluate_model(trained, SETS)
    assert set(scores) == {"statements/accuracy"} and TASK.figures == ("/accuracy",)
    assert percent(scores["statements/accuracy"]) > 90


def test_a_statement_has_the_logits_that_it_has_alone_in_the_order_of_the_file(trained):
    runs, source = runs_of(trained), SETS[0].source
    logits = judged(runs, trained)
    first, second = (next(SETS[0].pixel_batches(trained.preprocess, 8, others=other)) for other in (False, True))
    for place in range(3):
        ids = torch.from_numpy(trained.tokenize()(source.captions(place)))
        ids = ids[:, ids[0] != 0]  # without padding
        with torch.no_grad():
            states = [trained.module.image(torch.from_numpy(rows[place : place + 1])) for rows in (first, second)]
            alone = trained.module.reason(ids, None, *states)
            other = trained.module.reason(ids, None, *states[::-1])
        np.testing.assert_allclose(logits[place : place + 1], alone, atol=1e-4)
        assert not np.allclose(logits[place : place + 1], other, atol=1e-3)


def test_the_loss_is_the_cross_entropy_of_the_labels(trained):
    place = slice(0, 6)
    pixels, others = (
        torch.from_numpy(next(SETS[0].pixel_batches(trained.preprocess, 6, others=other))) for other in (False, True)
    )
    labels = torch.from_numpy(SETS[0].labels()[place])
    ids = torch.from_numpy(trained.tokenize()([SETS[0].source.captions(i)[0] for i in range(6)]))
    arrays = {"pixels": pixels, "other_pixels": others, "ids": ids, "label": labels, "group": torch.arange(6)}
    lesson = TASK.lesson(TrainingJob("t", trained, (), frozenset({"labels"}), (), "both", (SETS[0].source,), False))
    with torch.no_grad():
        outputs = lesson.module(trained.module.eval())(**lesson.inputs(arrays, None))
        gather = Gather(lambda rows: rows, local=True)
        loss, _ = Objective(terms_from(("classification",), "t"), lesson.sizes)(
            lesson.batch(outputs, (), arrays, {}, gather)
        )
    logits = torch.from_numpy(judged(runs_of(trained), trained)[place])
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels), atol=1e-4, rtol=1e-4)


def test_exchanged_images_have_their_words_exchanged():
    source = SETS[0].source
    place = next(i for i in range(len(source)) if "left" in source.captions(i)[0])
    record = Record(place, source.image(place), tuple(source.captions(place)), (), source.other_image(place))
    found = exchanged(record)
    assert found.captions[0] == source.captions(place)[0].replace("left", "right")
    assert np.array_equal(found.image, record.other_image) and np.array_equal(found.other_image, record.image)


def test_it_is_cut_distilled_and_quantized_and_its_files_judge_the_same(trained, context, tmp_path):
    context = replace(context, teachers=(trained,))
    settings = Prune(**CUT, losses=["classification", "logits"], steps=10)
    model, details = prune(settings, trained.copy(), context)
    assert details["block_params_kept"] == pytest.approx(0.7, abs=0.05)
    train(model, Training(steps=40, batch_size=16, lr=1e-3), ("classification", "logits", "tokens"), context)
    np.testing.assert_allclose(*judged_twice(model, tmp_path / "fp32"), atol=1e-3)
    model, _ = quantize(Quantize(steps=2, batch_size=16, calibrate=32, losses=["logits"]), model, context)
    assert any(".cross.1." in name for name in model.quantization["modules"])
    found, wanted = judged_twice(model, tmp_path / "int8")
    assert np.mean(found.argmax(1) == wanted.argmax(1)) > 0.9


def judged_twice(model, home):
    """Return the logits of every statement, by the files and in torch."""
    again, files = exported(model, SETS, home)
    assert set(files) == {"image", "reason"}
    return judged(files, again), judged(runs_of(again), again)


def test_upops_search_cuts_it(trained, context):
    model, details = prune(Prune(**CUT_BY_UPOP, losses=["classification"], steps=6), trained.copy(), context)
    assert 0.35 < details["block_params_kept"] < 0.75
    assert set(evaluate_model(model, SETS)) == {"statements/accuracy"}


def test_it_may_start_from_the_weights_of_another_blip():
    from_scratch = TASK.student_from(STUDENT, None, 0)
    teacher = task_named("retrieval").student_from(
        {**STUDENTS["retrieval"], "vocabulary": {"format": "statements"}}, None, 5
    )
    section = {key: value for key, value in STUDENT.items() if key != "vocabulary"}
    found = TASK.student_from({**section, "inherit": True}, teacher, 0).module.state_dict()
    theirs, random = teacher.module.state_dict(), from_scratch.module.state_dict()
    for name, rows in found.items():
        source = theirs.get(name.replace(".cross.1.", ".cross.0."), random[name])
        assert torch.equal(rows, source), name
    assert torch.equal(found["cls_head.0.weight"], random["cls_head.0.weight"])  # which the teacher does not have
    with pytest.raises(RecipeError, match=r"student.inherit: expected the teacher's sizes, but visual_encoder"):
        TASK.student_from({**section, "inherit": True, "width": 64}, teacher, 0)
    with pytest.raises(RecipeError, match=r"student.inherit: expected a teacher to copy weights from, found none"):
        TASK.check_student({**STUDENT, "inherit": True}, has_teacher=False)
    other = task_named("classification").student_from(STUDENTS["classification"], None, 0)
    with pytest.raises(RecipeError, match=r"expected a teacher that is a BLIP, found one of task classification"):
        TASK.student_from({**STUDENT, "inherit": True}, replace(other, tokenizer=teacher.tokenizer), 0)


def test_data_without_pairs_is_refused(trained, context):
    data = DataSpec(train=(SourceSpec(format="scenes", limit=16),))
    with pytest.raises(RecipeError, match="expected statements about pairs of images, but scenes has no pairs"):
        train(trained.copy(), Training(steps=1, batch_size=4), ("classification",), replace(context, data=data))
    with pytest.raises(RecipeError, match="scenes has no pairs of images"):
        evaluate_model(trained, evalsets([SourceSpec(format="scenes", split="val", limit=4)]))
