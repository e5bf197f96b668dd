"""The momentum model: its queue, empty or full of random rows at the start, and the ramp of its weight."""

import pytest
import torch

from clipress.compress.context import Context
from clipress.compress.ema import ALPHA, Queue
from clipress.compress.fabric import start_fabric
from clipress.compress.learner import Learner
from clipress.compress.loader import batches
from clipress.compress.losses import terms_from
from clipress.compress.settings import Runtime, Training
from clipress.compress.train import train
from clipress.data.spec import DataSpec, SourceSpec
from clipress.models.load import new_model
from clipress.models.tiny import tiny_architecture

CONFIG = Training(steps=6, batch_size=8, lr=1e-3, queue_size=20, queue_start="random")


def context(seed=0):
    data = DataSpec(train=(SourceSpec(format="scenes", limit=16),))
    teacher = new_model(tiny_architecture(layers=1), 1)
    return Context(start_fabric(Runtime(accelerator="cpu")), data, seed, (teacher,), title="t")


def first_step(config, loss="momentum-contrastive", seed=0):
    """Take one step. Returns what the losses read, the queue after it, and the loss."""
    student = new_model(tiny_architecture(layers=1), 0)
    learner = Learner(student, config, terms_from((loss,), "t"), context(seed))
    seen, step = [], learner.ema.step
    learner.ema.step = lambda *args: seen.append(step(*args)) or seen[0]
    arrays = {
        key: value for key, value in next(iter(batches(student, config, context(seed), 1))).items() if key != "bad"
    }
    total, _, finite = learner.gradients(0, arrays, [])
    assert finite
    return seen[0], learner.ema.past, total.detach()


def test_a_queue_that_starts_empty_holds_only_what_was_seen():
    momentum, past, _ = first_step(CONFIG.model_copy(update={"queue_start": "empty"}))
    assert len(momentum.all_image) == len(past["image"]) == 8


def test_a_queue_that_starts_full_holds_random_unit_rows_that_match_nothing():
    momentum, past, _ = first_step(CONFIG)
    assert momentum.all_image.shape == momentum.all_text.shape == (28, 32) and len(past["group"]) == 20
    for rows in (momentum.all_image[8:], momentum.all_text[8:]):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(20))
    assert not torch.equal(momentum.all_image[8:], momentum.all_text[8:])
    assert momentum.targets[:, 8:].sum() == 0 and past["group"][8:].eq(-1).all()
    # The oldest rows leave first: the random ones.
    assert torch.equal(past["image"][8:], momentum.all_image[8:20])


def test_random_rows_depend_on_the_seed_alone():
    (one, _, loss), (again, _, same), (other, _, _) = (first_step(CONFIG, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.all_image, again.all_image) and torch.equal(loss, same)
    assert not torch.equal(one.all_image[8:], other.all_image[8:])


def test_the_teachers_queue_starts_with_other_random_rows_than_the_students():
    momentum, past, _ = first_step(CONFIG, "upop-kd")
    assert set(past) == {"image", "text", "teacher_image", "teacher_text", "group"}
    assert momentum.teacher_image.shape == (28, 32)
    assert not torch.isclose(momentum.teacher_image[8:], momentum.all_image[8:]).all(1).any()


def test_random_rows_lower_the_share_of_the_right_answer():
    losses = [first_step(CONFIG.model_copy(update={"queue_start": start}))[2] for start in ("empty", "random")]
    assert losses[0] < losses[1]


@pytest.mark.parametrize(("counts", "steps"), [("items", 2), ("captions", 10)])
def test_the_weight_of_the_momentum_model_rises_for_one_epoch(counts, steps):
    """16 scenes with five captions each, in batches of 8."""
    config, student = CONFIG.model_copy(update={"epoch_counts": counts}), new_model(tiny_architecture(layers=1), 0)
    learner = Learner(student, config, terms_from(("momentum-contrastive",), "t"), context())
    rising = learner.ema
    arrays = {key: value for key, value in next(iter(batches(student, config, context(), 1))).items() if key != "bad"}
    weights, step = [], rising.step
    rising.step = lambda *args: weights.append(step(*args)) or weights[-1]
    for number in range(steps + 2):
        learner.gradients(number, arrays, [])
    assert [seen.alpha for seen in weights] == pytest.approx([ALPHA * min(n / steps, 1) for n in range(steps + 2)])


def test_without_a_queue_nothing_is_drawn():
    assert Queue(0, "random").first_rows({"image": torch.ones(2, 3)}) == {}


def test_training_with_a_random_queue_is_reproducible():
    def trained():
        torch.manual_seed(0)
        student = new_model(tiny_architecture(layers=1), 0)
        train(student, CONFIG, ("momentum-contrastive",), context())
        return student.module.state_dict()

    one, two = trained(), trained()
    assert all(torch.equal(one[name], two[name]) for name in one)
