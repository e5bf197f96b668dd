"""Tiny INT8 models that nothing was trained for: what their files compute can be tested, not how well."""

import torch

from clipress.export import parity
from clipress.models import quantizers
from clipress.models.load import Model, new_model
from clipress.models.tiny import tiny_architecture

CONVOLUTIONAL = {
    **tiny_architecture(layers=1),
    "vision_cfg": {
        "timm_model_name": "test_resnet",
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 32,
    },
}


def quantised(architecture, sets, keep=(), portable=True):
    """Build a model and make it INT8, calibrated on the first samples of `sets`."""
    model = new_model(architecture, 0)
    inputs = parity.samples(model.preprocess, model.tokenize(), sets)

    def calibrate(module):
        module.eval()
        module.encode_image(torch.from_numpy(inputs["image"]))
        module.encode_text(torch.from_numpy(inputs["text"]))

    names = quantizers.quantizable(model.module, keep)
    with torch.no_grad():
        model.module.train()
        for _ in range(20):  # norms that fit what they see
            model.module.encode_image(torch.from_numpy(inputs["image"]))
        quantizers.attach(model.module, names, calibrate, portable=portable)
    quantization = {"dtype": "int8", "modules": names, "calibrated_on": 16, "portable": portable}
    return Model(**{**model.__dict__, "quantization": quantization})
