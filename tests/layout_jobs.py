"""A tiny CLIP's export for the tests of layouts, and what the export itself makes of texts and images."""

import numpy as np
from PIL import Image

from clipress.artifact import save_artifact
from clipress.data.eval_sets import evalsets
from clipress.data.spec import SourceSpec
from clipress.data.transforms import fitted, normalised
from clipress.export.extra_models import extra_models_from_export
from clipress.export.layouts import LayoutJob
from clipress.export.settings import OnnxSettings
from clipress.export.to_onnx import onnx_from_artifact
from clipress.models.load import artifact_from_model, new_model
from clipress.models.tiny import tiny_architecture
from clipress.runtime.onnx_session import run_from_onnx

TEXTS = ["a photo of a cat", "It's 42 o'clock, isn't it?", "naïve café, Straße", "猫", "word " * 60]


def saved(model, folder):
    """Save a model as an artifact."""
    return save_artifact(artifact_from_model(model, ({"stage": "x", "hash": "abc"},), {}), folder)


def few_scenes():
    """Return the samples that exports are compared on."""
    return evalsets([SourceSpec(format="scenes", split="test", limit=8)])


def exported_job(home, model=None, **settings):
    """Save and export a model, by default a tiny CLIP."""
    artifact, sets = saved(model or new_model(tiny_architecture(layers=1), 0), home / "x"), few_scenes()
    settings = OnnxSettings(**settings)
    exported = onnx_from_artifact(artifact, home / "e", settings, sets)
    extra_models_from_export(home / "e", settings, sets)
    return LayoutJob(exported, artifact)


def embedded(job, texts=TEXTS, images=()):
    """Return what the export itself gives: embeddings of texts, and of images."""
    exported = job.exported
    text = run_from_onnx(exported.onnx("text"))({"input_ids": exported.tokenize()(texts)})["text_embeds"]
    if not len(images):
        return text
    pixels = np.stack(
        [normalised(fitted(image, exported.preprocess)[None], exported.preprocess)[0] for image in images]
    )
    return text, run_from_onnx(exported.onnx("image"))({"pixel_values": pixels})["image_embeds"]


def two_images():
    """Return an image of the model's size, and one that is neither of its size nor square."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, size, np.uint8)) for size in ((32, 32, 3), (40, 60, 3))]
