"""One training step with every loss, run alone, by torchrun or on a GPU; writes its losses, gradients and scores.

`distributed_job.py STRATEGY OUT [ACCELERATOR]`

Cases: each process scores its own rows or all of them; the student as wide as its first teacher, or narrower. Half of the
pairs have labels, an unequal number of them on two processes; groups repeat; the second teacher has a width of its own.
"""

import os
import sys
from pathlib import Path

import torch

from clipress.compress.context import Context
from clipress.compress.fabric import shut_down_distributed, start_fabric
from clipress.compress.learner import Learner
from clipress.compress.loader import batches
from clipress.compress.losses import LOSSES, needs_of, terms_from
from clipress.compress.prune.criterion import CRITERIA, Accumulator
from clipress.compress.prune.gates import Gates
from clipress.compress.settings import Runtime, Training
from clipress.data.spec import DataSpec, SourceSpec
from clipress.models.load import new_model
from clipress.models.tiny import tiny_architecture
from clipress.tasks.clip import Clip

COMPARABLE_WEIGHTS = {"feature": 100.0, "masked-feature": 100.0, "gradient": 0.1, "upop-kd": 0.1}
STEP = 3  # By then the EMA model contributes to the loss.
torch.set_num_threads(1)
accelerator = sys.argv[3] if len(sys.argv) > 3 else "cpu"
strategy = sys.argv[1]
fabric = start_fabric(Runtime(strategy=strategy, accelerator=accelerator, precision="fp32"))
several = fabric.world_size > 1
data = DataSpec(
    train=(SourceSpec(format="scenes", limit=64, weight=9), SourceSpec(format="digits", limit=64, weight=7))
)


def whole(gradient):
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()


def alike(gradient):
    """Return a gradient that must be the same on every process."""
    if several:
        copies = fabric.all_gather(gradient)
        assert torch.equal(copies[0], copies[1])
    return gradient.clone()


def case(local, embed_dim):
    needs = {name: needs_of(terms_from((name,), "job")) for name in LOSSES}
    names = [
        name for name in LOSSES if needs[name] <= Clip.provides and (embed_dim == 32 or "width" not in needs[name])
    ]
    losses = {name: {"weight": COMPARABLE_WEIGHTS.get(name, 1.0)} for name in names}
    losses["masked-feature"]["patch"] = 8
    student, *teachers = (
        new_model(tiny_architecture(layers=1, embed_dim=width), seed) for seed, width in enumerate((embed_dim, 32, 24))
    )
    student.module.to(fabric.device)
    gates = Gates(student.module, "separate")
    context = Context(fabric, data, 0, tuple(teachers), Runtime(local_loss=local), title="job")
    config = Training(steps=1, batch_size=16, grad_clip_norm=1e9)
    learner = Learner(student, config, terms_from(losses, "job"), context)
    arrays = {
        name: rows.to(fabric.device)
        for name, rows in next(iter(batches(student, config, context, 1))).items()
        if name != "bad"
    }
    if several:
        labelled = fabric.all_gather((arrays["label"] >= 0).sum())
        assert labelled[0] != labelled[1]
    _, parts, finite = learner.gradients(STEP, arrays, ())
    assert finite
    sums = Accumulator(CRITERIA["fisher"](), gates.sites)
    sums.add()
    seen = {
        "losses": {name: fabric.all_reduce(part.detach(), reduce_op="mean").item() for name, part in parts.items()},
        "gradients": {name: whole(p.grad) for name, p in student.module.named_parameters()},
        "learned": {name: alike(p.grad) for name, p in learner.objective.named_parameters()},
        "scores": [fabric.all_reduce(score, reduce_op="sum") for score in sums.sums],
    }
    gates.remove()
    return seen


seen = {(local, width): case(local, width) for local in (True, False) for width in (32, 16)}
if fabric.is_global_zero:
    torch.save(seen, sys.argv[2])
shut_down_distributed()
if strategy == "ddp":
    left = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in left), f"threads of the process group are left: {left}"
sys.stderr.flush()
os._exit(0)  # DTensor's caches keep FSDP2's groups, whose threads may abort a process that ends in the ordinary way.
