"""Write tiny CLIPs of open_clip with text towers of transformers, and what they compute, in a process of its own: FOLDER."""

import json
import sys
from pathlib import Path

import torch

VISION = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
_BERT |= {"max_position_embeddings": 100, "layer_norm_eps": 1e-5, "pad_token_id": 1, "type_vocab_size": 1}
_MT5 = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_kv": 12, "d_ff": 48, "pad_token_id": 0}
_MT5 |= {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6}
_M2M = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_layers": 1}
_M2M |= {"max_position_embeddings": 100, "scale_embedding": True, "pad_token_id": 1}
CASES = {  # config of the encoder, projection, pooling
    "roberta": ({"model_type": "roberta", **_BERT}, "mlp", "mean_pooler"),
    "xlm-roberta": ({"model_type": "xlm-roberta", **_BERT}, "linear", "mean_pooler"),
    "bert": (
        {"model_type": "bert", **_BERT, "pad_token_id": 0, "type_vocab_size": 2},
        "linear",
        "cls_last_hidden_state_pooler",
    ),
    "mt5": ({"model_type": "mt5", **_MT5}, "mlp", "mean_pooler"),
    "nllb": ({"model_type": "m2m_100", **_M2M}, "linear", "cls_pooler"),
}


def config_of(case):
    """Return the encoder's config, and the open_clip config without the encoder's."""
    encoder, projection, pooler = CASES[case]
    text = {"hf_model_name": "some/encoder", "hf_proj_type": projection, "hf_pooler_type": pooler}
    return {"vocab_size": 500, **encoder}, {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": text}


def write(folder):
    """Write every case as open_clip's hub folder, whose text tower's config is in it, with inputs and outputs in expected.pt."""
    from open_clip.model import CustomTextCLIP
    from safetensors.torch import save_file

    for case in CASES:
        torch.manual_seed(0)
        home, (encoder, config) = folder / case, config_of(case)
        home.mkdir()
        (home / "config.json").write_text(json.dumps(encoder))
        local = {"hf_model_name": str(home), "hf_model_pretrained": False}
        model = CustomTextCLIP(24, dict(VISION), {**config["text_cfg"], **local}).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
        save_file(
            {name: tensor.clone() for name, tensor in model.state_dict().items()}, home / "open_clip_model.safetensors"
        )
        about = {"model_cfg": config, "preprocess_cfg": {}, "text_config": encoder}
        (home / "open_clip_config.json").write_text(json.dumps(about))
        ids = torch.randint(2, 500, (3, 77))
        ids[0, 5:] = ids[1, 40:] = encoder["pad_token_id"]
        with torch.no_grad():
            torch.save({"ids": ids, "text": model.encode_text(ids)}, home / "expected.pt")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
