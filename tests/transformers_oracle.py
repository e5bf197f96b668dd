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
NAFLEX = "siglip2, square images"
WORDED = ("chinese_clip", "altclip", "siglip with its tokenizer")
"""Cases with a tokenizer in their folder."""
TEXTS = ["一只 Cat, sat", "a dog", "", "cats " * 40]
PIECES = ["cat", "s", "sat", "dog", "a", ",", "##s", "一", "只", "ca", "##t"]
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

    write_worded(folder)
    sides = {"vision_config": SIGLIP_VISION, "text_config": SIGLIP_TEXT}
    torch.manual_seed(0)
    model = disturbed(SiglipModel(SiglipConfig(**sides)).eval())
    model.save_pretrained(folder / SIGLIP)
    save_outputs(model, {"eos_token_id": 1}, folder / SIGLIP)
    write_naflex(folder)
    for name, (vision, text, options) in CASES.items():
        torch.manual_seed(0)
        vision, text = {"num_attention_heads": 3, **VISION, **vision}, {"num_attention_heads": 2, **TEXT, **text}
        model = CLIPModel(CLIPConfig(projection_dim=24, vision_config=vision, text_config=text)).eval()
        model = disturbed(model)
        model = model.half() if options.get("half") else model
        model.save_pretrained(folder / name, max_shard_size=options.get("max_shard_size", "1GB"))
        save_outputs(model.float(), text, folder / name)


def write_naflex(folder):
    """Write a Siglip2Model, its processor, and what it makes of a square image that the processor prepares."""
    import numpy as np
    from PIL import Image
    from transformers import Siglip2Config, Siglip2ImageProcessor, Siglip2Model

    vision = {key: value for key, value in SIGLIP_VISION.items() if key != "image_size"}
    torch.manual_seed(0)
    config = Siglip2Config(vision_config={**vision, "num_patches": 16}, text_config=SIGLIP_TEXT)
    model = disturbed(Siglip2Model(config).eval())
    model.save_pretrained(folder / NAFLEX)
    processor = Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    processor.save_pretrained(folder / NAFLEX)
    pixels, ids = inputs({"eos_token_id": 1})
    bytes_of = pixels.mul(40).add(128).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    images = [Image.fromarray(np.ascontiguousarray(rows)) for rows in bytes_of]
    with torch.no_grad():
        outputs = [
            model.get_image_features(**processor(images=images, return_tensors="pt")),
            model.get_text_features(input_ids=ids),
        ]
    normalised = torch.from_numpy(bytes_of).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    rows = [output.pooler_output for output in outputs]
    torch.save({"inputs": [normalised, ids], "outputs": rows}, folder / NAFLEX / "expected.pt")


def write_worded(folder):
    """Write models whose folders have a tokenizer, with its ids of TEXTS."""
    from transformers import AltCLIPConfig, AltCLIPModel, ChineseCLIPConfig, ChineseCLIPModel, SiglipConfig, SiglipModel

    encoder = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder |= {"vocab_size": 60, "max_position_embeddings": 30}
    vision = {**VISION, "num_attention_heads": 3}
    siglip = {**SIGLIP_TEXT, "vocab_size": 60}
    tokenizers = bert_pieces, xlm_pieces, siglip_pieces
    models = (
        ChineseCLIPModel(ChineseCLIPConfig(projection_dim=24, vision_config=vision, text_config=encoder)),
        AltCLIPModel(
            AltCLIPConfig(projection_dim=24, vision_config=vision, text_config={**encoder, "project_dim": 20})
        ),
        SiglipModel(SiglipConfig(vision_config=SIGLIP_VISION, text_config=siglip)),
    )
    for case, model, write_tokenizer, length in zip(WORDED, models, tokenizers, (30, 28, 24), strict=True):
        torch.manual_seed(0)
        disturbed(model.eval()).save_pretrained(folder / case)
        tokenizer = write_tokenizer(folder / case)
        words = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        if case.startswith("siglip"):
            words = {"input_ids": words["input_ids"]}  # It attends to padding.
        pixels = inputs({})[0]
        with torch.no_grad():
            outputs = [model.get_image_features(pixel_values=pixels), model.get_text_features(**words)]
        rows = [output.pooler_output for output in outputs]
        torch.save({"inputs": [pixels, words["input_ids"]], "outputs": rows}, folder / case / "expected.pt")


def bert_pieces(folder):
    """Write BERT's vocab.txt, and nothing else, as published Chinese CLIPs have it."""
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PIECES]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return BertTokenizer.from_pretrained(folder)


def xlm_pieces(folder):
    """Write XLM-R's tokenizer.json."""
    from transformers import AutoTokenizer, XLMRobertaTokenizer

    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    words = [(f"▁{piece}", -2.0 - number) for number, piece in enumerate(PIECES[:6])] + [
        (piece, -9.0) for piece in PIECES
    ]
    XLMRobertaTokenizer(vocab=[*special, *words, ("▁", -8.0), ("<mask>", 0.0)]).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def siglip_pieces(folder):
    """Write a tokenizer.json as published SigLIPs have it: lower case, an end token that is the padding too."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [("</s>", 0.0), ("<unk>", 0.0), *((f"▁{piece}", -2.0) for piece in PIECES[:5]), ("▁", -8.0), ("s", -9.0)]
    made = Tokenizer(models.Unigram(words, 1, False))
    made.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(",", "")])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="</s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    return tokenizer


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
