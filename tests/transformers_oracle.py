"""Write tiny models of Hugging Face transformers and what they compute, in a process of its own: FOLDER of the models."""

import sys
from pathlib import Path

import torch

VISION = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 24}
CASES = {
    "quick_gelu": ({}, {}, {}),
    "gelu, with other heads": ({"hidden_act": "gelu", "num_attention_heads": 6}, {"hidden_act": "gelu"}, {}),
    "pooled at an end token that is not the largest id": ({}, {"vocab_size": 500, "eos_token_id": 7}, {}),
    "as the first hub files say it": ({}, {"eos_token_id": 2}, {}),
    "in shards": ({}, {}, {"max_shard_size": "100KB"}),
    "in float16": ({}, {}, {"half": True}),
    "another epsilon": ({"layer_norm_eps": 1e-3}, {"layer_norm_eps": 1e-3}, {}),
}

SIGLIP = "siglip"
SIGLIP_VISION = {**VISION, "intermediate_size": 88, "num_attention_heads": 3}
SIGLIP_TEXT = {**TEXT, "num_attention_heads": 2, "projection_size": 40}


def inputs(text):
    """Return images and ids; every text has its end token somewhere."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(8, 400, (3, 24), generator=generator)
    end = text.get("eos_token_id", 49407)
    ids[range(3), [5, 12, 23]] = 49407 if end == 2 else end
    return torch.randn(3, 3, 32, 32, generator=generator), ids


def write(folder):
    """Write every case as a folder, with its inputs and outputs in expected.pt."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    sides = {"vision_config": SIGLIP_VISION, "text_config": SIGLIP_TEXT}
    torch.manual_seed(0)
    model = disturbed(SiglipModel(SiglipConfig(**sides)).eval())
    model.save_pretrained(folder / SIGLIP)
    save_outputs(model, {"eos_token_id": 1}, folder / SIGLIP)
    for name, (vision, text, options) in CASES.items():
        torch.manual_seed(0)
        vision, text = {"num_attention_heads": 3, **VISION, **vision}, {"num_attention_heads": 2, **TEXT, **text}
        model = CLIPModel(CLIPConfig(projection_dim=24, vision_config=vision, text_config=text)).eval()
        model = disturbed(model)
        model = model.half() if options.get("half") else model
        model.save_pretrained(folder / name, max_shard_size=options.get("max_shard_size", "1GB"))
        save_outputs(model.float(), text, folder / name)


def disturbed(model):
    """Return the model with every parameter away from its initial value, such as zero."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def save_outputs(model, text, folder):
    """Write expected.pt: images and texts, and what the model makes of them."""
    pixels, ids = inputs(text)
    with torch.no_grad():
        outputs = [model.get_image_features(pixel_values=pixels), model.get_text_features(input_ids=ids)]
    rows = [getattr(output, "pooler_output", output) for output in outputs]
    torch.save({"inputs": [pixels, ids], "outputs": rows}, folder / "expected.pt")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
