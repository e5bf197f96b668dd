"""A training step never makes the host wait for the device: counted on the CPU by the operations that would wait on a GPU."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.loader import batches
from clipress.compress.losses import LOSSES, terms_from
from clipress.compress.prune.budget import Budget
from clipress.compress.prune.gates import Gates
from clipress.compress.prune.search import Prune, Search
from clipress.compress.settings import Runtime, Training
from clipress.compress.train import Learner, Loop
from clipress.data.spec import DataSpec, SourceSpec
from clipress.models.load import new_model
from clipress.models.tiny import tiny_architecture
from clipress.tasks import task_named

aten = torch.ops.aten
WAITS = (aten._local_scalar_dense, aten.nonzero, aten.is_nonzero, aten.masked_select, aten.equal, aten.lift_fresh)
STEPS, WARM_UP = 100, 3


class HostWaits(TorchDispatchMode):
    """Count what waits on a GPU: values read by the host, shapes that depend on values, tensors made of host values."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet = function.overloadpacket
        indices = args[1] if packet in (aten.index, aten.index_put, aten.index_put_) else ()
        if packet in WAITS or any(i is not None and i.dtype == torch.bool for i in indices):
            self.seen[str(packet)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.isfinite().all()),
        lambda x: float(x[0]),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x + torch.tensor(2.0, device=x.device),
    ],
)
def test_the_counter_sees_what_waits(wait):
    with HostWaits() as waits:
        wait(torch.ones(3))
    assert sum(waits.seen.values()) == 1


@pytest.fixture(scope="module")
def context():
    fabric = start_fabric(Runtime(accelerator="cpu"))
    data = DataSpec(train=(SourceSpec(format="digits", limit=40),))
    return Context(fabric, data, 0, title="t", checkpoints=None)


def waits_of(context, settings, losses, hooks=lambda model: [], chunks=1):
    """Return what would wait in 100 steps after the first ones."""
    model, teacher = (new_model(tiny_architecture(layers=1), seed) for seed in (0, 1))
    own = replace(context, teachers=(teacher,), runtime=Runtime(grad_cache_chunks=chunks))
    loop = Loop(Learner(model, settings, terms_from(losses, "t"), own), hooks(model), settings, own)
    arrays = next(iter(batches(model, settings, own, 1, whole_texts=True)))
    arrays.pop("bad")
    lines = []
    for step in range(WARM_UP):
        loop.take_step(step, dict(arrays), 1e-4, lines.append)
    with HostWaits() as waits:
        for step in range(WARM_UP, WARM_UP + STEPS):
            loop.take_step(step, dict(arrays), 1e-4, lines.append)
    loop.settle(lines.append)
    assert len(lines) == WARM_UP + STEPS and loop.skipped == 0 and lines[0]["loss"] > lines[-1]["loss"]
    return waits.seen


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_plain_step_does_not_wait(context, chunks):
    settings = Training(steps=1000, batch_size=8)
    assert not waits_of(context, settings, ("contrastive",), chunks=chunks)


def test_no_loss_waits(context):
    losses = tuple(name for name in LOSSES if LOSSES[name].needs <= task_named("clip").provides)
    settings = Training(steps=1000, batch_size=8, queue_size=16)
    assert not waits_of(context, settings, losses)


@pytest.mark.parametrize("criterion", ["fisher", "upop", "hessian", "gauss-newton"])
def test_a_search_step_between_updates_of_the_masks_does_not_wait(context, criterion):
    budget = Budget(params=0.5)
    settings = Prune(budget=budget, criterion=criterion, steps=1000, update_every=500, batch_size=8)

    def search(model):
        space = "upop" if criterion == "upop" else "separate"
        return [Search(model, Gates(model.module, space), settings, 1000, 0, lambda total: total)]

    assert not waits_of(context, settings, ("contrastive", "feature"), search)


@pytest.mark.parametrize("losses", [("contrastive", "feature"), ("contrastive", "crd", "momentum-contrastive")])
def test_a_step_that_is_not_finite_leaves_no_trace(context, losses):
    settings = Prune(budget=Budget(params=0.5), steps=1000, update_every=500, batch_size=8, queue_size=12)
    model, teacher = (new_model(tiny_architecture(layers=1), seed) for seed in (0, 1))
    own = replace(context, teachers=(teacher,))
    search = Search(model, Gates(model.module, "separate"), settings, 1000, 0, lambda total: total)
    loop = Loop(Learner(model, settings, terms_from(losses, "t"), own), [search], settings, own)
    arrays = next(iter(batches(model, settings, own, 1, whole_texts=True)))
    arrays.pop("bad")

    def state():
        learner = loop.learner.state()
        ema = learner.pop("ema", {})
        return copy.deepcopy([learner, ema.get("past"), search.state()])

    loop.take_step(0, dict(arrays), 1e-3, lambda row: None)
    before = state()
    lines = []
    loop.take_step(1, arrays | {"pixels": arrays["pixels"] * float("nan")}, 1e-3, lines.append)
    after = state()
    loop.settle(lines.append)
    assert loop.skipped == 1 and [line["step"] for line in lines] == [0, 1, 1] and "contrastive" in lines[1]["skipped"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    loop.take_step(2, dict(arrays), 1e-3, lines.append)
    assert not torch.equal(state()[0]["student"]["visual.proj"], before[0]["student"]["visual.proj"])
