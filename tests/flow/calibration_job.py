"""INT8 calibration, alone or by torchrun; writes the ranges that every process has: `calibration_job.py METHOD OUT`."""

import sys

import torch

from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.quantize import Quantize, run
from clipress.compress.settings import Runtime
from clipress.data.spec import DataSpec, SourceSpec
from clipress.models.load import new_model
from clipress.models.tiny import tiny_architecture

torch.set_num_threads(1)
fabric = start_fabric(Runtime(accelerator="cpu", precision="fp32"))
data = DataSpec(train=(SourceSpec(format="scenes", limit=64),))
settings = Quantize(method=sys.argv[1], percentile=99, calibrate=64, batch_size=16, steps=0)
model, _ = run(settings, new_model(tiny_architecture(layers=1), 0), Context(fabric, data, 0, title="job"))
ranges = {name: scale for name, scale in model.module.state_dict().items() if name.endswith("_amax")}
both = {name: fabric.all_gather(scale).reshape(fabric.world_size, -1) for name, scale in ranges.items()}
if fabric.is_global_zero:
    torch.save(both, sys.argv[2])
fabric.barrier()
if fabric.world_size > 1:
    torch.distributed.destroy_process_group()
