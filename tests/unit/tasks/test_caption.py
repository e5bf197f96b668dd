"""The caption task: a BLIP learns to write captions, is pruned, distilled, quantized, exported, and its files write the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from blip_stages import CUT, CUT_BY_UPOP, exported
from helpers import SourceAround

from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.losses import Objective, terms_from
from clipress.compress.prune.search import Prune
from clipress.compress.prune.search import run as prune
from clipress.compress.quantize import Quantize
from clipress.compress.quantize import run as quantize
from clipress.compress.settings import Runtime, Training
from clipress.compress.train import train
from clipress.data.eval_sets import evalsets
from clipress.data.spec import BeamSearch, DataSpec, SourceSpec
from clipress.errors import DataError, RecipeError
from clipress.metrics.outcomes import percent
from clipress.tasks import evaluate_model, runs_of, task_named
from clipress.tasks.blip import pieces_of
from clipress.tasks.caption import captions_of
from clipress.tasks.training import Gather, TrainingJob

STUDENT = {
    "width": 32, "layers": 1, "heads": 2, "patch_size": 8, "image_size": 32, "text_width": 32, "text_layers": 1,
    "text_heads": 2, "context_length": 32, "vocabulary": {"format": "scenes", "limit": 200},
}  # fmt: skip
SEARCH = BeamSearch(longest=30)
SETS = evalsets([SourceSpec(format="scenes", split="val", limit=12, beam_search=SEARCH)])
TASK = task_named("caption")


@pytest.fixture(scope="module")
def context():
    return Context(
        start_fabric(Runtime(accelerator="cpu")), DataSpec(train=(SourceSpec(format="scenes"),)), 0, title="t"
    )


@pytest.fixture(scope="module")
def trained(context):
    model = TASK.student_from(STUDENT, None, 0)
    train(model, Training(steps=400, batch_size=16, lr=5e-3), ("lm",), context)
    return model


def written(runs, model, one=SETS[0]):
    return captions_of(runs, one, model.preprocess, pieces_of(model.tokenize()))


def test_it_learns_to_write_captions(trained):
    scores = evaluate_model(trained, SETS)
    untrained = evaluate_model(TASK.student_from(STUDENT, None, 0), SETS)
    assert set(scores) == {"scenes/cider", "scenes/bleu4"} and TASK.figures == ("/cider",)
    assert percent(scores["scenes/cider"]) > 40 > percent(untrained["scenes/cider"]) + 20
    assert percent(scores["scenes/bleu4"]) > 10 > percent(untrained["scenes/bleu4"])


def test_the_loss_is_the_mean_over_the_tokens_behind_the_prompt(trained):
    source = SETS[0].source
    texts = [source.captions(place)[place] for place in range(4)]
    ids = torch.from_numpy(trained.tokenize()(texts))
    pixels = torch.from_numpy(next(SETS[0].pixel_batches(trained.preprocess, 4)))
    job = TrainingJob("t", trained, (), frozenset({"words"}), (), "both", (source,), False)
    lesson = TASK.lesson(job)
    arrays = {"pixels": pixels, "ids": ids}
    with torch.no_grad():
        outputs = lesson.module(trained.module.eval())(**lesson.inputs(arrays, None))
    loss, _ = Objective(terms_from(("lm",), "t"), lesson.sizes)(
        lesson.batch(outputs, (), arrays, {}, Gather(lambda rows: rows, False))
    )
    targets = ids.masked_fill(ids == 0, -100)
    targets[:, :4] = -100  # [DEC] a picture of
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    wanted = F.cross_entropy(logits, targets[:, 1:].flatten(), ignore_index=-100, label_smoothing=0.1)
    torch.testing.assert_close(loss, wanted)
    # A process with fewer tokens counts by its tokens: its loss is divided by the mean of all processes.
    two = Gather(lambda rows: torch.cat([rows, 3 * rows]), False)
    less, _ = Objective(terms_from(("lm",), "t"), lesson.sizes)(lesson.batch(outputs, (), arrays, {}, two))
    torch.testing.assert_close(less, wanted / 2)


def test_a_batch_of_one_writes_what_a_larger_batch_writes(trained):
    runs = runs_of(trained)
    together = written(runs, trained)
    alone = [written(runs, trained, replace(SETS[0], source=One(SETS[0].source, place))) for place in range(3)]
    assert [text for (text,) in alone] == together[:3]


class One:
    """One image of a source."""

    def __init__(self, source, place):
        self.source, self.place = source, place

    def __len__(self):
        return 1

    def image(self, index):
        return self.source.image(self.place + index)


def test_it_is_cut_distilled_and_quantized_and_its_files_write_the_same(trained, context, tmp_path):
    context = replace(context, teachers=(trained,))
    model, details = prune(Prune(**CUT, losses=["lm", "logits"], steps=20), trained.copy(), context)
    assert details["block_params_kept"] == pytest.approx(0.7, abs=0.05)
    train(model, Training(steps=40, batch_size=16, lr=2e-3), ("lm", "logits"), context)
    assert written_alike(model, tmp_path / "fp32").all()
    model, _ = quantize(Quantize(steps=2, batch_size=16, calibrate=32, losses=["logits"]), model, context)
    names = {name.split(".")[0] for name in model.quantization["modules"]}
    assert names == {"visual_encoder", "text_decoder"}
    assert written_alike(model, tmp_path / "int8").mean() > 0.7


def written_alike(model, home):
    """Return which images have the same caption by the files as in torch."""
    again, files = exported(model, SETS, home)
    assert set(files) == {"image", "memory", "decode"} and again.tokenizer["prompt"] == "a picture of "
    return np.asarray(written(files, again)) == np.asarray(written(runs_of(again), again))


def test_upops_search_cuts_it(trained, context):
    model, details = prune(Prune(**CUT_BY_UPOP, losses=["lm"], steps=8), trained.copy(), context)
    assert 0.35 < details["block_params_kept"] < 0.65  # a head dim counts as 36 hidden units, which is not so here
    assert set(evaluate_model(model, SETS)) == {"scenes/cider", "scenes/bleu4"}


def test_a_student_takes_its_teachers_words_and_prompt(trained):
    section = {key: value for key, value in STUDENT.items() if key != "vocabulary"}
    student = TASK.student_from(section, trained, 1)
    assert student.tokenizer == trained.tokenizer
    other = TASK.student_from({**STUDENT, "prompt": "picture "}, None, 0)
    assert pieces_of(other.tokenize()).begun().shape == (2,)
    with pytest.raises(RecipeError, match=r"student.vocabulary: expected BERT's vocab.txt or a source of texts"):
        TASK.check_student(section, has_teacher=False)
    with pytest.raises(RecipeError, match=r"expected a vocab.txt or a source of texts, found nowhere.txt"):
        TASK.student_from({**STUDENT, "vocabulary": "nowhere.txt"}, None, 0)


def test_data_without_texts_is_refused(trained, context):
    data = DataSpec(train=(SourceSpec(format="shapes", limit=16),))
    with pytest.raises(RecipeError, match="a BLIP requires images and texts"):
        train(trained.copy(), Training(steps=1, batch_size=4), ("lm",), replace(context, data=data))
    with pytest.raises(RecipeError, match="shapes has no captions"):
        evaluate_model(trained, evalsets([SourceSpec(format="shapes", split="val", limit=4)]))


def test_an_image_whose_captions_cannot_be_read_is_left_out_of_an_evaluation():
    (one,) = evalsets([SourceSpec(format="scenes", split="val", limit=12, beam_search=SEARCH)])
    one.source = CaptionLost(one.source, 3)
    scores = evaluate_model(TASK.student_from(STUDENT, None, 0), [one])
    assert len(scores["scenes/cider"].values) == 11 and one.unread == ("caption 3 is lost",)


class CaptionLost(SourceAround):
    """A source of which the captions of one image cannot be read."""

    def __init__(self, source, lost):
        super().__init__(source)
        self.lost = lost

    def captions(self, index):
        if index == self.lost:
            raise DataError(f"caption {index} is lost")
        return self.source.captions(index)
