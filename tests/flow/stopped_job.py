"""Training in two processes, started by torchrun; only the second gets SIGTERM, in its third step."""

import signal
import sys
from pathlib import Path

from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.hook import Hook
from clipress.compress.settings import Runtime, Training
from clipress.compress.train import train
from clipress.data.spec import DataSpec, SourceSpec
from clipress.errors import Stopped
from clipress.models.load import new_model
from clipress.models.tiny import tiny_architecture


class Stop(Hook):
    def before(self, step, arrays):
        if step == 2 and fabric.global_rank == 1:
            signal.raise_signal(signal.SIGTERM)


fabric = start_fabric(Runtime(accelerator="cpu"))
data, home = DataSpec(train=(SourceSpec(format="digits", limit=40),)), Path(sys.argv[1])
context = Context(fabric, data, 0, log=home / "log.jsonl", checkpoints=home / "kept", title="job")
try:
    clip = new_model(tiny_architecture(layers=1), 0)
    train(clip, Training(steps=9, batch_size=8), {"contrastive": 1.0}, context, [Stop()])
except Stopped as stop:
    sys.exit(stop.exit_code)
