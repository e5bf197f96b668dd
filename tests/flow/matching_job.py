"""One batch through the matching loss of `task: retrieval`, alone or by torchrun; writes its loss, its gradients and scores of gates.

`matching_job.py NEGATIVES OUT`

The temperature is so low that wrong pairs are the most similar ones, whatever is drawn. Texts of two processes are padded to lengths of
their own.
"""

import gc
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from task_students import STUDENTS

from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.learner import Learner
from clipress.compress.loader import batches
from clipress.compress.losses import terms_from
from clipress.compress.prune.criterion import CRITERIA, Accumulator
from clipress.compress.prune.gates import Gates
from clipress.compress.settings import Runtime, Training
from clipress.data.spec import DataSpec, SourceSpec
from clipress.tasks import task_named

torch.set_num_threads(1)
fabric = start_fabric(Runtime(accelerator="cpu", precision="fp32"))


def step(negatives):
    student = task_named("retrieval").student_from(
        {**STUDENTS["retrieval"], "dropout": 0, "context_length": 40}, None, 0
    )
    student.module.temp.data.fill_(1e-6)
    gates = Gates(student.module, "separate")
    context = Context(fabric, DataSpec(train=(SourceSpec(format="scenes", limit=40),)), 0, title="job")
    config, terms = Training(steps=1, batch_size=8, grad_clip_norm=1e9), {"matching": {"negatives": negatives}}
    learner = Learner(student, config, terms_from(terms, "job"), context)
    arrays = next(iter(batches(student, config, context, 1)))
    arrays.pop("bad")
    arrays["ids"] = torch.nn.functional.pad(arrays["ids"], (0, fabric.global_rank))
    _, terms, _ = learner.gradients(0, arrays, ())
    sums = Accumulator(CRITERIA["fisher"](), gates.sites)
    sums.add()
    widths = fabric.all_gather(torch.tensor(arrays["ids"].shape[1]))
    return {
        "loss": fabric.all_reduce(terms["matching"].detach(), reduce_op="mean").item(),
        "gradients": {name: p.grad.clone() for name, p in student.module.named_parameters() if p.grad is not None},
        "scores": [fabric.all_reduce(score, reduce_op="sum") for score in sums.sums],
        "arrays": arrays,
        "widths": widths.flatten().tolist(),
    }


seen = step(sys.argv[1])
if fabric.is_global_zero:
    torch.save(seen, sys.argv[2])
gc.collect()  # what DDP keeps must not outlive its process group
fabric.barrier()
if fabric.world_size > 1:
    torch.distributed.destroy_process_group()
