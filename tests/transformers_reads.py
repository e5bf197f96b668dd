"""Read a layout as transformers does, in a process of its own: FOLDER, GIVEN (texts, an image file, labels), FOUND."""

import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, AutoTokenizer, pipeline


def read(folder, given):
    """Return the processor's ids and pixels, and of a folder with weights what the model and a pipeline make of them."""
    processor, image = AutoProcessor.from_pretrained(folder), Image.open(given["image"])
    inputs = {
        padding: processor(text=given["texts"], images=image, padding=padding, truncation=True, return_tensors="pt")
        for padding in (True, "max_length")
    }
    ids = AutoTokenizer.from_pretrained(folder)(given["texts"], padding="max_length", truncation=True).input_ids
    assert torch.equal(torch.tensor(ids), inputs["max_length"].input_ids)
    found = {"processor": type(processor).__name__, "ids": inputs["max_length"].input_ids}
    found["pixels"] = inputs[True].pixel_values
    return found | (_outputs(folder, given, inputs, image) if Path(folder, "model.safetensors").is_file() else {})


def _outputs(folder, given, inputs, image):
    model = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        made = {padding: model(**each) for padding, each in inputs.items()}
    answer = pipeline("zero-shot-image-classification", model=str(folder))
    scores = answer(image, candidate_labels=given["labels"], hypothesis_template="{}")
    return {
        "class": type(model).__name__,
        "texts": {padding: each.text_embeds for padding, each in made.items()},
        "images": made[True].image_embeds,
        "logits": made["max_length"].logits_per_image,
        "scores": {row["label"]: row["score"] for row in scores},
    }


if __name__ == "__main__":
    torch.save(read(sys.argv[1], torch.load(sys.argv[2])), sys.argv[3])
