"""A step on shapes keeps the bytes that the same step keeps on values."""

from dataclasses import replace

import pytest
import torch

from clipress.compress.context import Context
from clipress.compress.dry_run import (
    Ledger,
    PlannedFabric,
    Rehearsal,
    random_values_of,
    shapes_of,
    shapes_only,
    step_needs,
    timed_step,
)
from clipress.compress.fabric import start_fabric
from clipress.compress.learner import Learner
from clipress.compress.loader import batches
from clipress.compress.losses import LOSSES, terms_from
from clipress.compress.prune.gates import Gates
from clipress.compress.settings import Runtime, Training
from clipress.data.spec import DataSpec, SourceSpec
from clipress.models import quantizers
from clipress.models.load import new_model
from clipress.models.tiny import tiny_architecture
from clipress.tasks import task_named

DATA = DataSpec(train=(SourceSpec(format="digits", limit=40),))
CONFIG = Training(steps=1, batch_size=16, queue_size=16)
LAYERS = 2
SEARCH = ("separate", {})


def int8(model):
    """Put quantizers of scale 1 on every layer, in place."""
    modules, scales = dict(model.module.named_modules()), {}
    names = quantizers.quantizable(model.module)
    for name in names:
        weight = modules[name].weight
        scales[f"{name}.input_quantizer._amax"] = torch.ones(())
        scales[f"{name}.weight_quantizer._amax"] = torch.ones(len(weight), *[1] * (weight.ndim - 1))
    quantizers.restore(model.module, {"modules": names}, scales)


def models():
    return new_model(tiny_architecture(layers=LAYERS, embed_dim=16), 0), new_model(tiny_architecture(layers=1), 1)


def context_of(runtime, fabric):
    return Context(fabric, DATA, 0, (models()[1],), runtime, title="t")


def first_batch(runtime, whole_texts=False):
    arrays = next(
        iter(
            batches(
                models()[0], CONFIG, context_of(runtime, start_fabric(Runtime(accelerator="cpu"))), 1, 0, whole_texts
            )
        )
    )
    del arrays["bad"]
    return arrays


def counted(losses, runtime, gates=None, processes=1, whole_texts=False, change=lambda model: None):
    """What a step on shapes needs."""
    arrays, (student, _) = first_batch(runtime, whole_texts), models()
    change(student)
    with shapes_only():
        context = context_of(runtime, PlannedFabric(runtime, processes))
        context = replace(context, teachers=tuple(map(shapes_of, context.teachers)))
        shapes = {name: torch.zeros(rows.shape, dtype=rows.dtype) for name, rows in arrays.items()}
        return step_needs(Rehearsal(shapes_of(student), CONFIG, terms_from(losses, "t"), context, shapes, gates))


def kept(losses, runtime, gates=None, whole_texts=False, change=lambda model: None):
    """The learner after its second real step, and the bytes that autograd kept in it."""
    student, arrays = models()[0], first_batch(runtime, whole_texts)
    change(student)
    if gates is not None:
        Gates(student.module, *gates)
    learner = Learner(student, CONFIG, terms_from(losses, "t"), context_of(runtime, start_fabric(runtime)))
    learner.gradients(0, dict(arrays), ())
    learner.update(1e-4)
    learner.clear_gradients()
    teachers = [p for module in learner.teachers.modules for p in module.parameters()]
    past = learner.ema.past.values() if learner.ema else ()
    held = [*learner.encoder.parameters(), *learner.encoder.buffers(), *learner.objective.parameters(), *teachers]
    known = {tensor.data_ptr() for tensor in (*held, *arrays.values(), *past)}
    found = {}

    def note(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        learner.gradients(1, dict(arrays), ())
    return learner, sum(storage.nbytes() for at, storage in found.items() if at not in known)


def test_all_losses_together_keep_what_was_counted():
    losses = tuple(name for name in LOSSES if LOSSES[name].needs <= task_named("clip").provides - {"width"})
    needs, (_, activations) = (one(losses, Runtime(), whole_texts=True) for one in (counted, kept))
    assert needs.activations == pytest.approx(activations, rel=0.001)


def test_rounding_to_int8_keeps_what_was_counted():
    losses = ("feature", "affinity")
    needs, (_, activations) = (one(losses, Runtime(), change=int8) for one in (counted, kept))
    assert needs.activations == pytest.approx(activations, rel=0.001)
    assert needs.activations > 1.1 * counted(losses, Runtime()).activations


@pytest.mark.parametrize(
    ("change", "near"), [({}, 0), ({"grad_checkpointing": True}, 0), ({"precision": "bf16"}, 0.01)]
)
@pytest.mark.parametrize("gates", [None, SEARCH])
def test_settings_of_the_runtime_change_what_is_kept_as_counted(change, near, gates):
    losses, runtime = ("contrastive", "feature", "affinity"), Runtime(**change)
    needs, (learner, activations) = counted(losses, runtime, gates), kept(losses, runtime, gates)
    assert needs.activations == pytest.approx(activations, rel=max(near, 0.001))
    parameters = [*learner.module.parameters(), *learner.objective.parameters()]
    assert needs.trained == sum(p.numel() for p in parameters)
    assert needs.gradients == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    state = [
        t for one in (learner.optimizer, learner.own) for s in one.state_dict()["state"].values() for t in s.values()
    ]
    assert needs.optimizer == sum(tensor.nbytes for tensor in state)
    assert needs.teachers >= sum(p.nbytes for p in learner.context.teachers[0].module.parameters())
    assert needs.peak > needs.weights + needs.teachers + needs.optimizer + needs.batch + needs.activations


def test_checkpointing_and_chunks_lower_the_peak_and_an_ema_model_raises_it():
    plain = counted(("contrastive",), Runtime())
    checkpointed, chunked = (
        counted(("contrastive",), Runtime(**change))
        for change in ({"grad_checkpointing": True}, {"grad_cache_chunks": 4})
    )
    assert checkpointed.activations < 0.25 * plain.activations and checkpointed.peak < plain.peak
    assert 0.2 * plain.activations < chunked.activations < 0.3 * plain.activations
    momentum = counted(("momentum-contrastive",), Runtime())
    queue = 16 * (2 * 16 * 4 + 8)  # rows of two embeddings and a group
    assert plain.ema == 0 and momentum.ema == pytest.approx(plain.weights + queue, rel=0.001)
    assert momentum.peak > plain.peak + plain.weights


def test_several_processes_gather_rows_and_share_what_is_sharded():
    losses = ("contrastive",)
    alone, ddp = counted(losses, Runtime()), counted(losses, Runtime(), processes=2)
    sharded = counted(losses, Runtime(strategy="fsdp2"), processes=2)
    assert ddp.activations > alone.activations and ddp.gradients == 2 * alone.gradients  # buckets
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(sharded, name) == pytest.approx(getattr(alone, name) / 2, abs=1)
    assert sharded.peak < alone.peak


def test_a_ledger_counts_a_storage_while_it_exists():
    one = torch.zeros(10)
    ledger = Ledger([one])
    ledger.add(one[2:])
    assert ledger.peak == 0
    two = torch.zeros(20)
    ledger.add(two)
    ledger.add(two.view(4, 5))
    assert ledger.now == 80
    del two
    ledger.add(torch.zeros(5))
    assert (ledger.now, ledger.peak) == (0, 80)


@pytest.mark.parametrize("gates", [None, SEARCH])
def test_a_step_with_random_values_can_be_timed(gates):
    runtime = Runtime(accelerator="cpu")
    with torch.device("meta"):
        student, teacher = models()
    context = replace(context_of(runtime, start_fabric(runtime)), teachers=(random_values_of(teacher),))
    stage = Rehearsal(
        random_values_of(student),
        CONFIG,
        terms_from(("contrastive", "feature"), "t"),
        context,
        first_batch(runtime),
        gates,
    )
    took = timed_step(stage)
    assert took.seconds > 0 and took.peak_bytes == 0  # no GPU
