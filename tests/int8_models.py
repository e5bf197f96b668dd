"""Tiny untrained INT8 models: tests can compare what their files compute, not how accurate they are."""

import torch

from clipress.models import quantizers
from clipress.models.load import Model, new_model
from clipress.models.tiny import tiny_architecture
from clipress.tasks import task_named

CONVOLUTIONAL = {
    **tiny_architecture(layers=1),
    "vision_cfg": {
        "timm_model_name": "test_resnet",
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 32,
    },
}


def quantized(architecture, sets, keep=(), portable=True):
    """Build a model and make it INT8, calibrated on the first samples of `sets`."""
    model = new_model(architecture, 0)
    samples = task_named(model.task).samples(sets, model.preprocess, model.tokenize())
    pixels, ids = (torch.from_numpy(rows) for inputs in samples.values() for rows in inputs.values())

    def calibrate(module):
        module.eval()
        module.encode_image(pixels)
        module.encode_text(ids)

    names = quantizers.quantizable(model.module, keep)
    with torch.no_grad():
        model.module.train()
        for _ in range(20):  # Batch norms need statistics of these images.
            model.module.encode_image(pixels)
        quantizers.attach(model.module, names, calibrate, portable=portable)
    quantization = {"dtype": "int8", "modules": names, "calibrated_on": 16, "portable": portable}
    return Model(**{**model.__dict__, "quantization": quantization})
