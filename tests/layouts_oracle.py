"""Write layouts of tiny CLIPs with tokenizers of transformers, in a process of its own: FOLDER, the hub's cache too."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

TEXTS = ["a photo of a cat", "It's 42 O'clock, isn't_it?", "naïve  café, Straße", "猫", "word " * 90]
LAYOUTS = ("transformers", "transformers.js", "immich")
HIDDEN = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER = {"vocab_size": 500, "hidden_size": 32, **HIDDEN, "max_position_embeddings": 100, "layer_norm_eps": 1e-5}
CASES = {  # name on the hub, class of its tokenizer, special tokens in the order of their ids
    "siglip": ("timm/ViT-B-16-SigLIP", "T5Tokenizer", ["<pad>", "</s>", "<unk>"]),
    "siglip with the exact GELU": ("timm/ViT-B-16-SigLIP", "T5Tokenizer", ["<pad>", "</s>", "<unk>"]),
    "xlm-roberta": ("some/xlm-roberta", "XLMRobertaTokenizer", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]),
    "roberta": ("some/roberta", "RobertaTokenizer", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]),
}

TOKENIZERS = [case for case in CASES if "exact" not in case]
MODEL_TYPES = {"T5Tokenizer": "t5", "XLMRobertaTokenizer": "xlm-roberta", "RobertaTokenizer": "roberta"}


def put_tokenizer(name, kind, special):
    """Train a tokenizer on a few texts and put it into the hub's cache, as transformers would have fetched it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if kind == "RobertaTokenizer":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=letters)
    else:
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
    corpus = ["a photo of a cat and a dog", "its 42 o'clock naive cafe strasse", "word of words", "This is a photo"]
    made.train_from_iterator(corpus * 9, trainer)
    ids = {token: made.token_to_id(token) for token in special}
    if kind == "T5Tokenizer":
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", ids["</s>"])])
    else:
        made.post_processor = processors.RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]))
    home = Path(os.environ["HF_HOME"], "hub", f"models--{name.replace('/', '--')}")
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True, exist_ok=True)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text("0" * 40)
    made.save(str(snapshot / "tokenizer.json"))
    pad = "</s>" if kind == "T5Tokenizer" else "<pad>"
    config = {"tokenizer_class": kind, "pad_token": pad, "eos_token": "</s>", "unk_token": "<unk>"}
    (snapshot / "tokenizer_config.json").write_text(json.dumps(config))
    (snapshot / "config.json").write_text(json.dumps({"model_type": MODEL_TYPES[kind]}))


def model_of(case, name):
    """Return a model whose texts are read by the tokenizer."""
    from clipress.data.transforms import Preprocess
    from clipress.models.importers.siglip import Config, architecture
    from clipress.models.load import new_model

    if case.startswith("siglip"):
        act = {"hidden_act": "gelu"} if "exact" in case else {}
        vision = {"hidden_size": 32, **HIDDEN, "image_size": 32, "patch_size": 8, **act}
        text = {"hidden_size": 32, **HIDDEN, "max_position_embeddings": 64, **act}
        model = new_model(architecture(Config(vision_config=vision, text_config=text), has_tokenizer=False), 0)
        for parameter in model.module.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
        half = Preprocess(size=32, mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode="squash")
        return replace(model, preprocess=half)
    encoder = {"model_type": case, **ENCODER, "pad_token_id": 1, "type_vocab_size": 1}
    text = {"hf_model_name": name, "hf_tokenizer_name": name, "hf_proj_type": "mlp", "hf_config": encoder}
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    return new_model({"embed_dim": 24, "vision_cfg": vision, "text_cfg": {**text, "context_length": 32}}, 0)


def write(folder):
    """Write every case's artifact, export and layouts, with what the export makes of TEXTS in expected.npz."""
    from layout_jobs import embedded, exported_job

    from clipress.export.layouts import write_layout

    for case, (name, kind, special) in CASES.items():
        put_tokenizer(name, kind, special)
        job = exported_job(folder / case, model_of(case, name), joint=True)
        for layout in LAYOUTS:
            write_layout(layout, job, folder / case / layout)
        np.savez(folder / case / "expected.npz", ids=job.exported.tokenize()(TEXTS), texts=embedded(job, TEXTS))


if __name__ == "__main__":
    os.environ["HF_HOME"] = str(Path(sys.argv[1], "hub"))
    torch.manual_seed(0)
    write(Path(sys.argv[1]))
