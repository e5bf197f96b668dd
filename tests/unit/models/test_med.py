"""The text module of BLIP computes what transformers' does, and what its paper says where that one does not."""

import pytest
import torch
from blip_oracle import MEMORY, WIDTH, memory
from blip_reference import POSITIONS, VOCABULARY, texts
from oracles import run_oracle

from clipress.models.importers.blip import renamed
from clipress.models.med import Med, Sizes, Writer

SIZES = Sizes(VOCABULARY, WIDTH, 2, 2, POSITIONS)


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    return torch.load(run_oracle("blip_oracle.py", tmp_path_factory.mktemp("blip")) / "blip.pt", weights_only=True)


def loaded(module, prefix, state):
    own = renamed({f"{prefix}.{name}": tensor for name, tensor in state.items() if not name.endswith("position_ids")})
    module.load_state_dict({name.removeprefix(f"{prefix}."): tensor for name, tensor in own.items()})
    return module.eval()


def module(cls=Med, widths=(MEMORY,), **more):
    torch.manual_seed(0)
    made = cls(SIZES, widths, **more)
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return made.eval()


def test_texts_and_texts_beside_images_are_those_of_transformers(transformers):
    med, (ids, mask) = loaded(Med(SIZES, (MEMORY,)), "text_encoder", transformers["reader"]), texts()
    with torch.no_grad():
        torch.testing.assert_close(med(ids, mask), transformers["text"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(med(ids, mask, (memory(),)), transformers["beside"], atol=1e-5, rtol=1e-5)


def test_what_is_written_is_that_of_transformers_with_the_image_read_once_or_every_time(transformers):
    writer, (ids, mask) = loaded(Writer(SIZES, (MEMORY,)), "text_decoder", transformers["writer"]), texts()
    with torch.no_grad():
        every, once = writer.write(ids, mask, memory()), writer.write(ids, mask, None, keys=writer.keys(memory()))
        last = writer.write(ids, mask, memory(), last=True)
    for found in (every, once):
        torch.testing.assert_close(found, transformers["logits"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, every[:, -1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing(causal):
    """Of the text and of the memory, whose padding transformers' BLIP does not mask."""
    med, (ids, mask) = module(), texts()
    images, seen = memory(), torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    with torch.no_grad():
        whole = med(ids, mask, (images,), seen, causal)
        alone = med(ids[1:, : mask[1].sum()], None, (images[1:, :5],), None, causal)
        other = med(ids + 7 * (1 - mask), mask, (images + 3 * (1 - seen[..., None]),), seen, causal)
    torch.testing.assert_close(whole[1:, : mask[1].sum()], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other[mask > 0], whole[mask > 0], atol=0, rtol=0)


def test_a_written_word_sees_earlier_ones_only():
    writer, (ids, _) = module(Writer), texts()
    with torch.no_grad():
        whole, start = (writer.write(rows, None, memory()) for rows in (ids, ids[:, :3]))
    torch.testing.assert_close(whole[:, :3], start, atol=1e-5, rtol=1e-5)


def test_dropout_is_at_work_in_training_only():
    (ids, mask), still = texts(), module(dropout=0.0)
    med = module()
    with torch.no_grad():
        for own in (med, still):
            assert torch.equal(own(ids, mask, (memory(),)), still(ids, mask, (memory(),)))
        med.train(), still.train()
        assert torch.equal(still(ids, mask), still(ids, mask)) and not torch.equal(med(ids, mask), med(ids, mask))
        for layer in med.layers:  # of the attention weights alone
            layer.dropout.p = med.dropout.p = 0.0
        assert not torch.equal(med(ids, mask), med(ids, mask))


@pytest.mark.filterwarnings("ignore")
def test_it_is_exported_with_texts_of_any_length(tmp_path):
    import onnxruntime

    writer, (ids, mask) = module(Writer), texts()

    class Graph(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.writer = writer

        def forward(self, ids, mask, keys):
            return self.writer.write(ids, mask, None, keys=keys)

    path, keys = tmp_path / "writer.onnx", writer.keys(memory()).detach()
    axes = {"ids": {0: "rows", 1: "length"}, "mask": {0: "rows", 1: "length"}, "keys": {0: "rows", 1: "tokens"}}
    torch.onnx.export(
        *(Graph().eval(), (ids, mask, keys), str(path)),
        input_names=list(axes),
        dynamic_axes=axes,
        opset_version=18,
        dynamo=False,
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for rows, length in ((2, 7), (1, 3)):
        own = [tensor[:rows, :length] for tensor in (ids, mask)] + [keys[:rows]]
        found = session.run(None, {name: tensor.numpy() for name, tensor in zip(axes, own, strict=True)})[0]
        with torch.no_grad():
            wanted = writer.write(own[0], own[1], None, keys=own[2])
        torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-4, rtol=1e-4)
