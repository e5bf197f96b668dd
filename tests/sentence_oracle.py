"""Write a tiny CLIP as sentence-transformers saves it, and what it encodes, in a process of its own: FOLDER."""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers_oracle import TEXT, VISION, disturbed

SENTENCES = ["a photo of a cat, sat", "Dogs!"]
SAVED = "saved"


def image():
    """Return an image of the model's size, uint8 [32, 32, 3], which no library has to resize."""
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def write(folder):
    """Write the model of transformers, and sentence-transformers' folder of it with expected.pt."""
    from PIL import Image
    from sentence_transformers import SentenceTransformer
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    sides = {"vision_config": {**VISION, "num_attention_heads": 3}, "text_config": {**TEXT, "num_attention_heads": 2}}
    disturbed(CLIPModel(CLIPConfig(projection_dim=24, **sides)).eval()).save_pretrained(folder / "source")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    pixels = CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7], **size)
    CLIPProcessor(pixels, clip_tokenizer()).save_pretrained(folder / "source")
    model = SentenceTransformer(str(folder / "source"), device="cpu")
    model.save(str(folder / SAVED))
    rows = [torch.from_numpy(model.encode(given)) for given in ([Image.fromarray(image())], SENTENCES)]
    torch.save(rows, folder / SAVED / "expected.pt")


def clip_tokenizer():
    """Return transformers' CLIP tokenizer with the vocabulary that comes with open_clip."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    own = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in own.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(own.bpe_ranks), model_max_length=24)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
