"""Tiny INT8 models that nothing was trained for: what their files compute can be tested, not how well."""

import torch

from clipress.export import parity
from clipress.models import quantizers
from clipress.models.load import Clip, new_clip
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
    clip = new_clip(architecture, 0)
    inputs = parity.samples(clip.preprocess, clip.tokenize(), sets)

    def calibrate(model):
        model.eval()
        model.encode_image(torch.from_numpy(inputs["image"]))
        model.encode_text(torch.from_numpy(inputs["text"]))

    names = quantizers.quantizable(clip.model, keep)
    with torch.no_grad():
        clip.model.train()
        for _ in range(20):  # norms that fit what they see
            clip.model.encode_image(torch.from_numpy(inputs["image"]))
        quantizers.attach(clip.model, names, calibrate, portable=portable)
    quantization = {"dtype": "int8", "modules": names, "calibrated_on": 16, "portable": portable}
    return Clip(**{**clip.__dict__, "quantization": quantization})
