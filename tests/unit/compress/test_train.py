"""The training loop: schedule, weight decay, non-finite steps, teachers, frozen towers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from task_students import DATA, STUDENTS

from clipress.compress.context import Context, steps_of
from clipress.compress.fabric import start_fabric
from clipress.compress.hook import Hook
from clipress.compress.learner import optimizer_for, parameter_groups
from clipress.compress.loader import batches
from clipress.compress.settings import Runtime, Training
from clipress.compress.train import MAX_BAD_STEPS, learning_rate, train
from clipress.data.spec import DataSpec, SourceSpec
from clipress.data.transforms import Augment
from clipress.errors import ClipressError, DataError, RecipeError
from clipress.models.drop_path import set_drop_path
from clipress.models.load import new_model
from clipress.models.tiny import tiny_architecture
from clipress.tasks import task_named


@pytest.fixture(scope="module")
def fabric():
    return start_fabric(Runtime(accelerator="cpu"))


@pytest.fixture
def context(fabric, tmp_path):
    return Context(
        fabric, DataSpec(train=(SourceSpec(format="digits", limit=40),)), 0, log=tmp_path / "log.jsonl", title="t"
    )


def rows(context):
    return [json.loads(line) for line in context.log.read_text().splitlines()]


def test_the_learning_rate_warms_up_then_decays_as_a_cosine_to_zero():
    rates = [learning_rate(step, 100, Training(steps=100, lr=1.0, warmup_ratio=0.2)) for step in range(101)]
    assert rates[:20] == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert (
        rates[60] == pytest.approx(0.5)
        and rates[100] == pytest.approx(0)
        and rates[20:] == sorted(rates[20:], reverse=True)
    )


@pytest.mark.parametrize("schedule", ["cosine", "poly"])
def test_a_learning_rate_decays_to_its_least(schedule):
    config = Training(steps=100, lr=1.0, warmup_ratio=0, lr_schedule=schedule, min_lr=0.2)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[0] == 1 and rates[100] == pytest.approx(0.2) and rates == sorted(rates, reverse=True)
    if schedule == "poly":
        assert rates[1:] == pytest.approx([0.2 + 0.8 * (1 - (step - 1) / 99) ** 0.9 for step in range(1, 101)])


def test_sgd_takes_the_steps_of_torch_and_leaves_out_those_that_are_not_finite():
    gradients = [float("nan"), 1.0, 2.0, float("inf"), -1.0]
    own, other = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    config = Training(steps=5, lr=0.1, optimizer="sgd", momentum=0.8)
    found = optimizer_for([{"params": [own], "weight_decay": 0.0}], config)
    plain = torch.optim.SGD([other], lr=0.1, momentum=0.8, nesterov=True)
    for gradient in gradients:
        own.grad, other.grad = (torch.full((3,), gradient) for _ in range(2))
        found.found_inf = torch.tensor(float(not np.isfinite(gradient)))
        found.step()
        if np.isfinite(gradient):
            plain.step()
    torch.testing.assert_close(own, other)


def test_a_constant_learning_rate_stays_after_warmup():
    config = Training(steps=10, lr=0.5, warmup_ratio=0, lr_schedule="constant")
    assert [learning_rate(step, 10, config) for step in range(10)] == [0.5] * 10


def test_norms_biases_and_the_scale_do_not_decay():
    model = new_model(tiny_architecture(), 0).module
    decayed, others = parameter_groups(model, Training(steps=1, weight_decay=0.1))
    assert all(p.ndim >= 2 for p in decayed["params"]) and all(p.ndim < 2 for p in others["params"])
    assert others["weight_decay"] == 0 and decayed["weight_decay"] == 0.1
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_norms_biases_and_the_scale_decay_too_as_published_by_upop():
    model = new_model(tiny_architecture(), 0).module
    groups = parameter_groups(model, Training(steps=1, weight_decay=0.2, decay_vectors=True))
    assert [group["weight_decay"] for group in groups] == [0.2, 0.2]


def test_a_classifier_s_positions_and_class_token_do_not_decay():
    student = {"width": 32, "layers": 1, "heads": 2, "patch_size": 8, "image_size": 32, "labels": ("a", "b")}
    module = task_named("classification").student_from(student, None, 0).module
    _, _, still = parameter_groups(module, Training(steps=1), module.no_weight_decay())
    assert still["weight_decay"] == 0
    assert {id(p) for p in still["params"]} == {id(module.pos_embed), id(module.cls_token)}


def test_epochs_are_passes_over_the_first_source(context):
    assert steps_of(Training(epochs=2, batch_size=8), context.data) == 10


def test_an_epoch_may_count_captions_as_upop_does(context):
    scenes = replace(context, data=DataSpec(train=(SourceSpec(format="scenes", limit=40),)))  # five captions each
    assert steps_of(Training(epochs=2, batch_size=8), scenes.data) == 10
    assert steps_of(Training(epochs=2, batch_size=8, epoch_counts="captions"), scenes.data) == 50


def test_training_lowers_the_loss_and_logs_every_step(context):
    model = new_model(tiny_architecture(layers=1), 0)
    record = train(model, Training(steps=25, batch_size=16, lr=2e-3), {"contrastive": 1.0}, context)
    log = rows(context)
    assert [row["step"] for row in log] == list(range(25)) and record["steps"] == 25
    assert sum(row["loss"] for row in log[-5:]) < 0.9 * sum(row["loss"] for row in log[:5])
    assert float(model.module.logit_scale.detach().exp()) <= 100.001


class Poison(Hook):
    """Make weights NaN before chosen steps and restore them afterwards."""

    def __init__(self, model, steps):
        self.weight, self.steps = model.visual.proj, steps

    def before(self, step, arrays):
        self.original = self.weight.detach().clone()
        if step in self.steps:
            self.weight.data.fill_(float("nan"))

    def heal(self):
        self.weight.data.copy_(self.original)


def test_a_step_that_is_not_finite_is_skipped_counted_and_named(context):
    model = new_model(tiny_architecture(layers=1), 0)
    poison = Poison(model.module, {2})
    before = poison.before

    def before_and_heal(step, arrays):
        if step == 3:
            poison.heal()
        before(step, arrays)

    poison.before = before_and_heal
    record = train(model, Training(steps=5, batch_size=8, lr=1e-3), {"contrastive": 1.0}, context, [poison])
    assert record["skipped_steps"] == 1
    assert [row["skipped"] for row in rows(context) if "skipped" in row] == [["contrastive"]]
    assert all(p.isfinite().all() for p in model.module.parameters())


def test_too_many_bad_steps_stop_the_run_with_the_terms_name(context):
    model = new_model(tiny_architecture(layers=1), 0)
    model.module.visual.proj.data.fill_(float("nan"))
    with pytest.raises(ClipressError, match=f"contrastive was not finite for {MAX_BAD_STEPS} steps"):
        train(model, Training(steps=50, batch_size=8), {"contrastive": 1.0}, context)


def test_a_loss_that_requires_a_teacher_reports_it(context):
    with pytest.raises(RecipeError, match="require a teacher"):
        train(new_model(tiny_architecture(layers=1), 0), Training(steps=1), {"feature": 1.0}, context)


def test_a_teacher_that_does_not_fit_the_student_is_rejected(context):
    student, teacher = (new_model(tiny_architecture(layers=1, **own), 0) for own in ({"embed_dim": 16}, {}))
    with pytest.raises(RecipeError, match="width, 32, found 16"):
        train(student, Training(steps=1), {"upop-kd": 1.0}, replace(context, teachers=(teacher,)))


@pytest.mark.parametrize("augment", [Augment(), Augment(crop_scale=(0.5, 1), flip=True)])
def test_a_teacher_of_another_image_size_sees_the_same_views_in_its_own(context, augment):
    large = new_model(tiny_architecture(layers=1, image_size=64), 1)
    own = large.preprocess.model_copy(update={"mean": (0.1, 0.2, 0.3), "resize_mode": "squash"})
    small, large = new_model(tiny_architecture(layers=1), 0), replace(large, preprocess=own)
    alike = new_model(tiny_architecture(layers=1), 2)
    context = replace(context, teachers=(alike, large), data=context.data.model_copy(update={"augment": augment}))
    arrays = next(iter(batches(small, Training(steps=1, batch_size=4), context, 1)))
    loader = batches(replace(small, preprocess=own), Training(steps=1, batch_size=4), replace(context, teachers=()), 1)
    as_large = next(iter(loader))  # what a student with the teacher's preprocessing is shown
    assert arrays["pixels"].shape[-1] == 32 and "teacher_pixels_0" not in arrays
    assert torch.equal(arrays["teacher_pixels_1"], as_large["pixels"]) and as_large["pixels"].shape[-1] == 64
    seen = []
    for teacher in (alike, large):
        teacher.module.visual.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    train(small, Training(steps=1, batch_size=4, lr=1e-3), {"feature": 1.0, "ensemble": 1.0}, context)
    assert torch.equal(seen[0], arrays["pixels"]) and torch.equal(seen[1], arrays["teacher_pixels_1"])


def test_a_shift_in_pixels_is_refused_where_the_teacher_has_others(context):
    data = context.data.model_copy(update={"augment": Augment(shift=2)})
    small, large = (new_model(tiny_architecture(layers=1, image_size=size), 0) for size in (32, 64))
    with pytest.raises(DataError, match=r"augment\.shift is in pixels.*found 64 and 32"):
        train(small, Training(steps=1), {"feature": 1.0}, replace(context, data=data, teachers=(large,)))


def test_the_teacher_is_not_trained(fabric, context):
    student, teacher = new_model(tiny_architecture(layers=1), 0), new_model(tiny_architecture(layers=1), 1)
    before = {name: tensor.clone() for name, tensor in teacher.module.state_dict().items()}
    train(
        student,
        Training(steps=2, batch_size=8, lr=1e-2),
        {"feature": 1.0, "affinity": 1.0},
        replace(context, teachers=(teacher,)),
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.module.state_dict().items())
    assert all(p.grad is None for p in teacher.module.parameters())


def student_and_teacher(**own):
    return new_model(tiny_architecture(layers=1, **own), 0), new_model(tiny_architecture(layers=1), 1)


class Gradients(Hook):
    """Record the gradients of a step, and the number of chunks."""

    def __init__(self, model):
        self.model, self.parts, self.seen = model, 0, {}

    def after_part(self, step, finite):
        self.parts += 1

    def after_backward(self, step):
        self.seen = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("change", [{"grad_cache_chunks": 4}, {"grad_checkpointing": True}, {"local_loss": False}])
def test_chunks_and_checkpointing_do_not_change_the_gradient(context, change):
    seen, last = [], []
    for runtime in (Runtime(), Runtime(**change)):
        student, teacher = student_and_teacher(embed_dim=16)
        look = Gradients(student.module)
        own = replace(context, teachers=(teacher,), runtime=runtime)
        losses = {
            "contrastive": 1.0,
            "affinity": 1.0,
            "feature": 10.0,
            "momentum-contrastive": 1.0,
            "tokens": 1.0,
            "classification": 0.1,
        }
        losses |= {"masked-feature": 10.0, "fused": 1.0}
        record = train(student, Training(steps=1, batch_size=16, grad_clip_norm=1e9), losses, own, [look])
        seen.append(look.seen)
        last.append(record["last"])
        assert look.parts == change.get("grad_cache_chunks", 1) or runtime == Runtime()
    assert last[0] == pytest.approx(last[1], rel=1e-5)
    assert seen[0].keys() == seen[1].keys() and len(seen[0]) > 20
    for name, gradient in seen[0].items():
        torch.testing.assert_close(seen[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_batch_norms_count_a_batch_once_for_any_number_of_chunks():
    from clipress.compress.grad_cache import frozen_statistics

    norm = torch.nn.BatchNorm1d(3)
    before = norm.running_mean.clone(), norm.running_var.clone()
    with frozen_statistics(norm):
        norm(torch.randn(8, 3) + 5)
    assert torch.equal(norm.running_mean, before[0]) and torch.equal(norm.running_var, before[1])
    norm(torch.randn(8, 3) + 5)
    assert not torch.equal(norm.running_mean, before[0])


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_frozen_tower_keeps_its_weights_and_is_not_run_if_unused(context, tower):
    student, teacher = student_and_teacher()
    before = {name: tensor.clone() for name, tensor in student.module.state_dict().items()}
    runs = []
    other = {"image": student.module.transformer, "text": student.module.visual}[tower]
    handle = other.register_forward_hook(lambda *_: runs.append(1))
    config = Training(steps=2, batch_size=8, lr=1e-2, towers=tower)
    train(student, config, {"feature": 1.0}, replace(context, teachers=(teacher,)))
    handle.remove()
    moved = {name for name, tensor in student.module.state_dict().items() if not torch.equal(before[name], tensor)}
    assert runs == [] and moved
    assert {name.startswith("visual.") for name in moved} == {tower == "image"}
    assert all(parameter.requires_grad for parameter in student.module.parameters())


@pytest.mark.parametrize(
    "losses", [("tokens",), ("masked-feature",), ("embedding-kl", "l1", "embedding-ce"), ("mse",), ("cross",)]
)
@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_tower_can_be_distilled_alone(context, losses, tower):
    student, teacher = student_and_teacher(embed_dim=16)
    config = Training(steps=1, batch_size=8, towers=tower)
    record = train(student, config, losses, replace(context, teachers=(teacher,)))
    assert record["last"]["loss"] > 0 and record["skipped_steps"] == 0


def test_token_features_leave_no_hooks_behind(context):
    student, teacher = student_and_teacher()
    train(student, Training(steps=1, batch_size=8), {"tokens": 1.0}, replace(context, teachers=(teacher,)))
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.module.modules())


def test_labels_alone_train_a_classifier(context):
    student, teacher = student_and_teacher(embed_dim=16)
    config = Training(steps=30, batch_size=16, lr=5e-3, towers="image")
    record = train(student, config, ("classification",), replace(context, teachers=(teacher,)))
    assert record["last"]["classification"] < 0.8 * rows(context)[0]["classification"]


def test_token_features_of_different_counts_are_rejected_before_training(context):
    student = new_model(tiny_architecture(layers=1, patch=16), 0)
    with pytest.raises(RecipeError, match=r"the student's image tower as in the teacher's \(17\), found 5"):
        train(student, Training(steps=1), ("tokens",), replace(context, teachers=(student_and_teacher()[1],)))


def test_different_widths_use_trained_projections_outside_the_student(context):
    student, teacher = student_and_teacher(embed_dim=16)
    names = set(student.module.state_dict())
    record = train(
        student, Training(steps=30, batch_size=16, lr=5e-3), {"feature": 100.0}, replace(context, teachers=(teacher,))
    )
    log = rows(context)
    assert record["last"]["feature"] < 0.5 * log[0]["feature"] and set(student.module.state_dict()) == names


def two_layers():
    return task_named("classification").student_from({**STUDENTS["classification"], "layers": 2}, None, 0)


def test_stochastic_depth_follows_from_the_seed_alone(context):
    """All rows of a batch are one image, so that the seed decides nothing but which branches are left out."""
    context = replace(context, data=DataSpec(train=(SourceSpec(format="digits", limit=1),)))

    def weights(seed, rate, before):
        model = two_layers()
        torch.manual_seed(before)
        state = torch.get_rng_state()
        config = Training(steps=3, batch_size=8, drop_path=rate, lr=1e-2)
        train(model, config, ("classification",), replace(context, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([rows.flatten() for rows in model.module.state_dict().values()])

    found = weights(0, 0.5, 1)
    assert torch.equal(weights(0, 0.5, 2), found)
    assert not torch.equal(weights(1, 0.5, 1), found)
    assert torch.equal(weights(0, 0.0, 1), weights(1, 0.0, 2))


class Start(Hook):
    """Record what a step starts with: its batch and the state of torch's generator."""

    def before(self, step, arrays):
        self.arrays, self.state = dict(arrays), torch.get_rng_state()


def test_the_gradient_of_chunks_with_stochastic_depth_is_that_of_both_at_once(context):
    model, by_hand, start = two_layers(), two_layers().module, Start()
    look = Gradients(model.module)
    config = Training(steps=1, batch_size=16, grad_clip_norm=1e9, drop_path=0.5)
    chunked = replace(context, runtime=Runtime(grad_cache_chunks=2))
    train(model, config, ("classification",), chunked, [start, look])
    set_drop_path(by_hand.train(), 0.5)
    torch.set_rng_state(start.state)
    logits = torch.cat([by_hand(chunk) for chunk in start.arrays["pixels"].chunk(2)])
    torch.nn.functional.cross_entropy(logits, start.arrays["label"]).backward()
    wanted = {name: p.grad for name, p in by_hand.named_parameters()}
    assert look.parts == 2 and look.seen.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(look.seen[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("task", "losses", "layer", "drop_path"),
    [
        ("classification", ("classification",), "head", 0.5),
        ("retrieval", ("contrastive", "matching"), "itm_head", 0.0),
        ("caption", ("lm",), "text_decoder.head", 0.0),
    ],
)
def test_a_chunk_is_encoded_twice_with_the_same_random_numbers(context, task, losses, layer, drop_path):
    """BLIP's text modules have dropout, and negatives are drawn for the pairs of its retrieval."""
    student = STUDENTS[task] | ({"layers": 2} if drop_path else {})
    model, seen = task_named(task).student_from(student, None, 0), []
    module = model.module.get_submodule(layer)
    handle = module.register_forward_hook(lambda _, __, outputs: seen.append(outputs.detach().clone()))
    data = DataSpec(train=(SourceSpec(format=DATA[task], limit=40),))
    context = replace(context, data=data, runtime=Runtime(grad_cache_chunks=2))
    config = Training(steps=1, batch_size=16, drop_path=drop_path)
    train(model, config, losses, context)
    handle.remove()
    first, second, *again = seen
    assert len(again) == 2 and torch.equal(first, again[0]) and torch.equal(second, again[1])
    assert not torch.equal(first, second)
