"""Training, in two processes if torchrun starts it: `stopped_job.py HOME STRATEGY [STEP]`.

Only the last process gets SIGTERM, in the given step. A job that ends writes its weights to HOME/made.pt.
"""

import signal
import sys
from pathlib import Path

import torch

from clipress.compress.context import Context
from clipress.compress.fabric import shut_down_distributed, start_fabric
from clipress.compress.hook import Hook
from clipress.compress.settings import Runtime, Training
from clipress.compress.train import train
from clipress.data.spec import DataSpec, SourceSpec
from clipress.errors import Stopped
from clipress.models.load import new_model
from clipress.models.tiny import tiny_architecture


class Stop(Hook):
    def before(self, step, arrays):
        if step == stop and fabric.global_rank == fabric.world_size - 1:
            signal.raise_signal(signal.SIGTERM)


runtime = Runtime(accelerator="cpu", strategy=sys.argv[2])
fabric = start_fabric(runtime)
data, home = DataSpec(train=(SourceSpec(format="digits", limit=40),)), Path(sys.argv[1])
stop = int(sys.argv[3]) if len(sys.argv) > 3 else None
context = Context(fabric, data, 0, runtime=runtime, log=home / "log.jsonl", checkpoints=home / "kept", title="job")
try:
    clip = new_model(tiny_architecture(layers=1), 0)
    losses = {"contrastive": 1.0, "momentum-contrastive": 1.0}
    train(clip, Training(steps=9, batch_size=8, lr=1e-3, queue_size=16), losses, context, [Stop()])
    if fabric.is_global_zero:
        torch.save(clip.module.state_dict(), home / "made.pt")
    shut_down_distributed()
except Stopped as stop:
    sys.exit(stop.exit_code)
