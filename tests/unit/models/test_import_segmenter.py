"""Files of Segmenter and of UPop's compressed ones compute what their own code does."""

import pytest
import torch
from segmenter_reference import LABELS, as_published, pixels

from clipress.errors import ArtifactError
from clipress.models import segmenter, surgery
from clipress.models.importers import detected, import_checkpoint
from clipress.models.weights_file import weights_from_file

HEAD = {"encoder.head.weight": torch.ones(7, 128), "encoder.head.bias": torch.ones(7)}
SIZES = {"img_size": 48, "patch_size": 16, "embed_dim": 128, "depth": 2, "num_heads": 2}


def published(dims=(64, 64, 64, 64), hidden=(512, 512, 512, 512)):
    """Return the tensors of a file; of every block its own number of dims per head, and of hidden units."""
    model = segmenter.build({"sizes": SIZES, "labels": LABELS, "decoder_layers": 2}, 0)
    state, rng = surgery.stock_weights(model), torch.Generator().manual_seed(1)
    blocks = [f"{side}.blocks.{layer}." for side in ("encoder", "decoder") for layer in range(2)]
    for at, dim, units in zip(blocks, dims, hidden, strict=True):
        shapes = {
            "attn.qkv.weight": (6 * dim, 128), "attn.qkv.bias": (6 * dim,), "attn.proj.weight": (128, 2 * dim),
            "mlp.fc1.weight": (units, 128), "mlp.fc1.bias": (units,), "mlp.fc2.weight": (128, units),
        }  # fmt: skip
        state |= {at + name: torch.randn(shape, generator=rng) * 0.05 for name, shape in shapes.items()}
    return {name: tensor + 0.05 * torch.randn(tensor.shape, generator=rng) for name, tensor in state.items()}


@pytest.mark.parametrize("cut", [{}, {"dims": (40, 7, 64, 1), "hidden": (300, 1, 512, 20)}])
def test_a_file_computes_what_its_own_code_does(tmp_path, cut):
    state = published(**cut)
    masks = {"encoder.blocks.0.attn.alpha": torch.ones(1, 1, 1, 1, 64)}
    content = {"model": {**state, **HEAD, **masks}, "optimizer": {}, "n_cls": 5, "epoch": 63}
    torch.save(content, tmp_path / "checkpoint.pth")
    assert detected(weights_from_file(tmp_path / "checkpoint.pth", None).state) == "segmenter"
    model = import_checkpoint(tmp_path / "checkpoint.pth")
    with torch.no_grad():
        torch.testing.assert_close(model.module(pixels()), as_published(state, pixels(), 0.125), atol=1e-5, rtol=1e-5)
    assert (model.task, model.architecture["labels"]) == ("segmentation", ["0", "1", "2", "3", "4"])
    assert model.preprocess.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"decoder.blocks.1.attn.qkv.weight": torch.zeros(100, 128)},
            "rows of q, k and v for 2 equal heads, found 100",
        ),
        ({"decoder.mask_norm.weight": torch.zeros(4)}, r"decoder\.mask_norm\.weight: expected .*\[5\].*found .*\[4\]"),
        ({"decoder.extra": torch.zeros(4)}, "1 tensors have no place in its architecture: decoder.extra"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, change, message):
    torch.save({"model": {**published(), **change}}, tmp_path / "checkpoint.pth")
    with pytest.raises(ArtifactError, match=message):
        import_checkpoint(tmp_path / "checkpoint.pth")
