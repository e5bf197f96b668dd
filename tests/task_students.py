"""Shared by tests of every task: the smallest student of each, and an embedded set that it learns and is measured on."""

from clipress.models.tiny import tiny_architecture

DATA = {
    "clip": "digits",
    "classification": "digits",
    "segmentation": "shapes",
    "retrieval": "scenes",
    "nlvr": "statements",
    "caption": "scenes",
    "vqa": "questions",
}
BLIP = {
    "width": 32, "layers": 1, "heads": 2, "patch_size": 8, "image_size": 32, "text_width": 32, "text_layers": 1, "text_heads": 2
}  # fmt: skip
STUDENTS = {
    "clip": tiny_architecture(layers=1),
    "classification": {
        "width": 32, "layers": 1, "heads": 2, "patch_size": 8, "image_size": 32,
        "labels": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
    },
    "segmentation": {
        "width": 32, "layers": 1, "heads": 2, "patch_size": 8, "image_size": 32, "decoder_layers": 1,
        "labels": ["background", "circle", "square", "triangle", "cross"],
    },
    "retrieval": {**BLIP, "embed_dim": 16, "context_length": 16, "vocabulary": {"format": "scenes", "limit": 20}},
    "nlvr": {**BLIP, "context_length": 16, "vocabulary": {"format": "statements", "limit": 20}},
    "caption": {**BLIP, "context_length": 16, "vocabulary": {"format": "scenes", "limit": 20}},
    "vqa": {**BLIP, "context_length": 16, "answer_length": 4, "vocabulary": {"format": "questions", "limit": 20}},
}  # fmt: skip
