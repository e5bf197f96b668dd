"""A search whose activations are recomputed in the backward pass scores every unit as one that keeps them."""

import pytest
import torch
from task_students import DATA, STUDENTS

from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.hook import Hook
from clipress.compress.losses import terms_from
from clipress.compress.prune.criterion import CRITERIA, Accumulator
from clipress.compress.prune.gates import Gates
from clipress.compress.settings import Runtime, Training
from clipress.compress.train import train
from clipress.data.spec import DataSpec, SourceSpec
from clipress.tasks import TASKS, task_named


class Seen(Hook):
    """Record the gradients of a step, and the scores and per-sample gradients of all gates."""

    def __init__(self, model, criterion):
        self.model, self.gates = model, Gates(model, CRITERIA[criterion].space)
        self.scores = Accumulator(CRITERIA[criterion](), self.gates.sites)
        self.weights, self.samples = {}, {}

    def after_part(self, step, finite):
        self.samples = {site.name: site.gradient() for site in self.gates.sites}
        self.scores.add(finite)

    def after_backward(self, step):
        self.weights = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


def search(task, criterion, runtime):
    """Take one step of a search. Returns what it saw, and how many blocks of the image tower ran."""
    student = task_named(task).student_from(STUDENTS[task], None, 0)
    data = DataSpec(train=(SourceSpec(format=DATA[task], limit=8),))
    context = Context(start_fabric(runtime), data, 0, runtime=runtime, title="t")
    seen, calls = Seen(student.module, criterion), []
    attention = next(site.part for site in seen.gates.sites if site.part.tower == "image").module
    attention.register_forward_hook(lambda *_: calls.append(1))
    losses = task_named(task).stage_defaults.get("prune", {"losses": ["contrastive"]})["losses"]
    train(student, Training(steps=1, batch_size=4), terms_from(losses, "t"), context, [seen])
    return seen, len(calls)


@pytest.mark.parametrize("criterion", ["fisher", "upop", "hessian"])
@pytest.mark.parametrize("task", TASKS)
def test_a_search_that_recomputes_activations_sees_the_same_gradients(task, criterion):
    kept, once = search(task, criterion, Runtime(accelerator="cpu"))
    recomputed, twice = search(task, criterion, Runtime(accelerator="cpu", grad_checkpointing=True))
    assert twice == 2 * once
    assert kept.weights.keys() == recomputed.weights.keys() and len(kept.weights) > 10
    for name, gradient in kept.weights.items():
        torch.testing.assert_close(recomputed.weights[name], gradient)
    for name, gradient in kept.samples.items():
        assert len(gradient) == 4 and bool(gradient.any())
        torch.testing.assert_close(recomputed.samples[name], gradient)
    for found, wanted in zip(recomputed.scores.sums, kept.scores.sums, strict=True):
        assert bool(wanted.any())
        torch.testing.assert_close(found, wanted)
