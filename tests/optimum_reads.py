"""Read a layout as optimum does, in a process of its own: FOLDER, GIVEN (texts, an image file), FOUND."""

import sys

import torch
from optimum.onnxruntime import ORTModelForCustomTasks, ORTModelForZeroShotImageClassification
from PIL import Image
from transformers import AutoProcessor


def read(folder, given):
    """Return what the joint file makes of the texts and the image, and what each encoder does."""
    processor = AutoProcessor.from_pretrained(folder)
    padding = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    inputs = processor(text=given["texts"], images=Image.open(given["image"]), **padding)
    model = ORTModelForZeroShotImageClassification.from_pretrained(folder)
    outputs = model(**inputs)
    encoders = {
        name: ORTModelForCustomTasks.from_pretrained(folder, subfolder="onnx", file_name=f"{name}_model.onnx")
        for name in ("text", "vision")
    }
    return {
        "logits": [outputs.logits_per_image, outputs.logits_per_text],
        "texts": [outputs.text_embeds, encoders["text"](input_ids=inputs["input_ids"])["text_embeds"]],
        "images": [outputs.image_embeds, encoders["vision"](pixel_values=inputs["pixel_values"])["image_embeds"]],
    }


if __name__ == "__main__":
    torch.save(read(sys.argv[1], torch.load(sys.argv[2])), sys.argv[3])
