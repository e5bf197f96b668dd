"""A Segmenter computed from the tensors of a published file, by its paper."""

import torch
import torch.nn.functional as F

WIDTH, HEADS, SIZE, PATCH = 64, 2, 48, 16
LABELS = ["sky", "road", "tree", "car", "house"]


def pixels(rows=2):
    return torch.randn(rows, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def as_published(state, images, scale=(WIDTH // HEADS) ** -0.5):
    """Compute a Segmenter from the tensors of a published file, whose blocks may be slim."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def run(x, name):
        q, k, v = (
            linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
            .reshape(*x.shape[:2], 3, HEADS, -1)
            .permute(2, 0, 3, 1, 4)
        )
        mixed = (((q @ k.mT) * scale).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(mixed, f"{name}.attn.proj")
        return x + linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")

    patches = F.conv2d(
        images, state["encoder.patch_embed.proj.weight"], state["encoder.patch_embed.proj.bias"], stride=PATCH
    )
    x = torch.cat([state["encoder.cls_token"].expand(len(images), -1, -1), patches.flatten(2).mT], 1)
    x = x + state["encoder.pos_embed"]
    for layer in range(2):
        x = run(x, f"encoder.blocks.{layer}")
    x = linear(norm(x, "encoder.norm")[:, 1:], "decoder.proj_dec")
    count = x.shape[1]
    x = torch.cat([x, state["decoder.cls_emb"].expand(len(images), -1, -1)], 1)
    for layer in range(2):
        x = run(x, f"decoder.blocks.{layer}")
    x = norm(x, "decoder.decoder_norm")
    ours, classes = x[:, :count] @ state["decoder.proj_patch"], x[:, count:] @ state["decoder.proj_classes"]
    ours, classes = (rows / rows.norm(dim=-1, keepdim=True) for rows in (ours, classes))
    masks = norm(ours @ classes.transpose(1, 2), "decoder.mask_norm")
    return masks.permute(0, 2, 1).unflatten(2, (SIZE // PATCH, SIZE // PATCH))
