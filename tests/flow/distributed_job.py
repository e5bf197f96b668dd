"""One training step with every loss, started alone or by torchrun; writes the losses, gradients and scores it saw."""

import sys

import torch

from clipress.compress.losses import TERMS
from clipress.compress.prune.criterion import CRITERIA, Accumulator
from clipress.compress.prune.gates import Gates
from clipress.compress.train import Context, Hook, Runtime, Training, start_fabric, train
from clipress.data.pairs import DataSpec, SourceSpec
from clipress.models.load import new_clip
from clipress.models.tiny import tiny_architecture

torch.set_num_threads(1)
fabric = start_fabric(Runtime(strategy=sys.argv[1], accelerator="cpu"))
data = DataSpec(train=(SourceSpec(format="digits", limit=64),))
student, teacher = (new_clip(tiny_architecture(layers=1), seed) for seed in (0, 1))
gates = Gates(student.model, "separate")
seen = {}


class Look(Hook):
    def before(self, step, arrays):
        gates.clear()

    def after_backward(self, step):
        whole = {
            n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            for n, p in student.model.named_parameters()
        }
        seen["gradients"] = {name: gradient.clone() for name, gradient in whole.items()}
        sums = Accumulator(CRITERIA["fisher"], gates.sites)
        sums.add()
        several = fabric.world_size > 1
        seen["scores"] = [fabric.all_reduce(s, reduce_op="sum") if several else s for s in sums.sums]


weights = dict.fromkeys(TERMS, 1.0)
record = train(
    student,
    Training(steps=1, batch_size=16, lr=1e-3, clip=1e9),
    weights,
    Context(fabric, data, 0, (teacher,), title="job"),
    [Look()],
)
if fabric.is_global_zero:
    torch.save({**seen, "losses": record["last"]}, sys.argv[2])
