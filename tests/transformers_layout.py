"""The layout of Hugging Face transformers' CLIPModel, written without that library."""

import torch

from clipress.models import surgery


def exact_layout(module):
    """Return a plain open_clip ViT's weights and config as transformers stores them."""
    state, found = surgery.stock_weights(module), {"logit_scale": module.logit_scale.detach()}
    sides = {"text_model": "", "vision_model": "visual."}
    found["text_model.embeddings.token_embedding.weight"] = state["token_embedding.weight"]
    found["text_model.embeddings.position_ids"] = torch.arange(24)[None]
    found["vision_model.embeddings.class_embedding"] = state["visual.class_embedding"]
    found["vision_model.embeddings.patch_embedding.weight"] = state["visual.conv1.weight"]
    for side, own in sides.items():
        found[f"{side}.embeddings.position_embedding.weight"] = state[f"{own}positional_embedding"]
    for kind in ("weight", "bias"):
        found[f"text_model.final_layer_norm.{kind}"] = state[f"ln_final.{kind}"]
        found[f"vision_model.pre_layrnorm.{kind}"] = state[f"visual.ln_pre.{kind}"]
        found[f"vision_model.post_layernorm.{kind}"] = state[f"visual.ln_post.{kind}"]
        for side, own in sides.items():
            for layer in range(2):
                at, block = f"{side}.encoder.layers.{layer}", f"{own}transformer.resblocks.{layer}"
                rows = state[f"{block}.attn.in_proj_{kind}"].chunk(3)
                found |= {f"{at}.self_attn.{part}_proj.{kind}": one for part, one in zip("qkv", rows, strict=True)}
                found[f"{at}.self_attn.out_proj.{kind}"] = state[f"{block}.attn.out_proj.{kind}"]
                found[f"{at}.layer_norm1.{kind}"] = state[f"{block}.ln_1.{kind}"]
                found[f"{at}.layer_norm2.{kind}"] = state[f"{block}.ln_2.{kind}"]
                found[f"{at}.mlp.fc1.{kind}"] = state[f"{block}.mlp.c_fc.{kind}"]
                found[f"{at}.mlp.fc2.{kind}"] = state[f"{block}.mlp.c_proj.{kind}"]
    found["visual_projection.weight"] = state["visual.proj"].T
    found["text_projection.weight"] = state["text_projection"].T
    both = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    both["hidden_act"] = "gelu"
    config = {
        "model_type": "clip",
        "projection_dim": 32,
        "vision_config": {**both, "image_size": 32, "patch_size": 8},
        "text_config": {**both, "max_position_embeddings": 24},
    }
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}, config
