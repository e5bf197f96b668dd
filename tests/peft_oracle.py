"""Write tiny adapters of PEFT, their bases, and what peft makes of both, in a process of its own: FOLDER."""

import copy
import json
import sys
from pathlib import Path

import torch
from transformers_oracle import TEXT, VISION, disturbed, save_outputs

WORDS = {**TEXT, "num_attention_heads": 2, "vocab_size": 500, "eos_token_id": 499}
CASES = {  # of transformers' CLIPModel
    "plain": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 16},
    "ranks and scales by pattern": {
        "target_modules": ["k_proj", "fc1"],
        "rank_pattern": {"fc1": 3},
        "alpha_pattern": {"text_model.*fc1": 5, "layers.1.self_attn.k_proj": 7},
    },
    "rank-stabilized": {"target_modules": "all-linear", "use_rslora": True, "r": 4},
    "tables, a convolution, biases and whole modules": {
        "target_modules": ["token_embedding", "patch_embedding", "fc2"],
        "bias": "all",
        "modules_to_save": ["visual_projection"],
    },
    "biases of its modules": {"target_modules": ["out_proj"], "bias": "lora_only"},
}
OPEN_CLIP = {
    "of open_clip": ["c_fc", "c_proj", "token_embedding"],
    "of open_clip's attention": ["attn"],
}
REFUSED = {
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "pissa": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "biases beside the pairs": {"target_modules": ["q_proj"], "lora_bias": True},
}


def write(folder):
    """Write the bases, and every adapter with expected.pt beside its files."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    sides = {"vision_config": {**VISION, "num_attention_heads": 3}, "text_config": WORDS}
    disturbed(CLIPModel(CLIPConfig(projection_dim=24, **sides))).save_pretrained(folder / "base")
    for case, settings in {**CASES, **REFUSED}.items():
        model = get_peft_model(CLIPModel.from_pretrained(folder / "base").eval(), LoraConfig(**settings))
        _move(model)
        model.save_pretrained(folder / case)
        again = PeftModel.from_pretrained(CLIPModel.from_pretrained(folder / "base"), folder / case)
        save_outputs(again.merge_and_unload().eval(), WORDS, folder / case)
    write_open_clip(folder, LoraConfig, PeftModel, get_peft_model)


def write_open_clip(folder, config, reader, wrap):
    """Write adapters of an open_clip model, whose attention is torch's own."""
    from open_clip.model import CLIP
    from safetensors.torch import load_file, save_file

    towers = {
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1},
        "text_cfg": {"context_length": 24, "vocab_size": 500, "width": 32, "heads": 2, "layers": 1},
    }
    base = folder / "open_clip"
    base.mkdir()
    model = disturbed(CLIP(24, **towers).eval())
    save_file({name: one.clone() for name, one in model.state_dict().items()}, base / "open_clip_model.safetensors")
    (base / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 24, **towers}}))
    for case, targets in OPEN_CLIP.items():
        model = CLIP(24, **towers).eval()
        model.load_state_dict(load_file(base / "open_clip_model.safetensors"))
        adapted = wrap(copy.deepcopy(model), config(target_modules=targets))
        _move(adapted)
        adapted.save_pretrained(folder / case)
        model = reader.from_pretrained(model, folder / case).merge_and_unload().eval()
        pixels, ids = torch.randn(3, 3, 32, 32), torch.randint(1, 499, (3, 24))
        with torch.no_grad():
            rows = [model.encode_image(pixels), model.encode_text(ids)]
        torch.save({"inputs": [pixels, ids], "outputs": rows}, folder / case / "expected.pt")


def _move(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
