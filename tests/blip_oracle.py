"""Write the tensors of tiny text modules of transformers' BLIP and what they compute, in a process of its own: FOLDER."""

import sys
from pathlib import Path

import torch
from blip_reference import POSITIONS, VOCABULARY, texts

WIDTH, MEMORY = 128, 96
SIZES = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}


def memory():
    return torch.randn(2, 9, MEMORY, generator=torch.Generator().manual_seed(5))


def write(folder):
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextModel

    config = BlipTextConfig(
        **SIZES,
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
        encoder_hidden_size=MEMORY,
        layer_norm_eps=1e-12,
    )
    (ids, mask), images = texts(), memory()
    torch.manual_seed(0)
    reader, writer = BlipTextModel(config, add_pooling_layer=False).eval(), BlipTextLMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in (*reader.parameters(), *writer.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape)
        text = reader(ids, attention_mask=mask, is_decoder=False).last_hidden_state
        beside = reader(ids, attention_mask=mask, encoder_hidden_states=images, is_decoder=False).last_hidden_state
        logits = writer(ids, attention_mask=mask, encoder_hidden_states=images).logits
    found = {"reader": reader.state_dict(), "writer": writer.state_dict()}
    torch.save(found | {"text": text, "beside": beside, "logits": logits}, folder / "blip.pt")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
