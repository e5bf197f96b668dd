"""Texts without padding: the same embeddings where a text tower reads to its end token, whole texts everywhere else."""

from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from text_towers import END, TOWERS, WHOLE, clip, texts

from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.loader import batches
from clipress.compress.settings import Runtime, Training
from clipress.data.padding import TextEnd, without_padding
from clipress.data.spec import DataSpec, SourceSpec
from clipress.models import anatomy, surgery
from clipress.models.text_length import text_end, text_ends
from clipress.models.tiny import tiny_architecture
from clipress.tasks import runs_of


@pytest.mark.parametrize(("text", "changes"), TOWERS.values(), ids=TOWERS)
def test_embeddings_and_gradients_are_those_of_whole_texts(text, changes):
    model = clip(text, changes)
    model.module.double()
    ids = texts([3, 5, 8], text.get("eos_id", END))
    short = without_padding(ids, text_ends(model))
    assert short.shape == (3, 8) and (short == ids[:, :8]).all()
    found = [model.module.encode_text(torch.from_numpy(rows), normalize=True) for rows in (ids, short)]
    assert torch.allclose(*found, atol=1e-12)
    gradients = [torch.autograd.grad(y[:, 0].sum(), anatomy.tower_parameters(model.module, "text")) for y in found]
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*gradients, strict=True))


def test_a_cut_tower_computes_the_same_from_short_texts():
    model = clip({}, {})
    for part in anatomy.attentions(model.module):
        keep = torch.ones(part.module.heads, part.module.qk_dim, dtype=torch.bool)
        keep[:, 3:] = False
        surgery.cut(part, surgery.AttnMask(keep, keep))
    ids = torch.from_numpy(texts([4, 7], END))
    assert torch.allclose(model.module.encode_text(ids), model.module.encode_text(ids[:, :8]), atol=1e-5)


def test_our_class_computes_what_open_clips_own_does():
    ours = clip({}, {}).module
    stock = open_clip.model.CLIP(**tiny_architecture()).eval()
    stock.load_state_dict(surgery.stock_weights(ours))
    ids = torch.from_numpy(texts([3, 24], END))
    assert isinstance(ours, open_clip.model.CLIP)
    assert torch.allclose(ours.encode_text(ids), stock.encode_text(ids), atol=1e-6)
    assert torch.allclose(ours.encode_text(ids[:1, :3]), stock.encode_text(ids[:1]), atol=1e-6)


@pytest.mark.parametrize("text", WHOLE.values(), ids=WHOLE)
def test_a_tower_that_reads_padding_gets_whole_texts(text):
    architecture = tiny_architecture()
    architecture["text_cfg"] |= text
    module = surgery.use_own_attention(open_clip.model.CustomTextCLIP(**architecture))
    ids = texts([3, 5], END)
    assert text_end(module) is None and without_padding(ids, [text_end(module)]) is ids
    assert without_padding(ids, [TextEnd(), None]) is ids


def test_texts_are_cut_to_few_lengths_and_never_beyond_what_any_tower_reads():
    cut = {n: without_padding(texts([n, 2], 49407, context=77), [TextEnd()]).shape[1] for n in range(2, 78)}
    assert all(n <= cut[n] for n in cut) and len(set(cut.values())) == 7
    ids = texts([5, 5], END, context=77)
    ids[:, 20] = 2  # another tower's end token
    assert without_padding(ids, [TextEnd(), TextEnd(2)]).shape[1] == 24


def test_a_teacher_with_another_end_token_in_a_larger_vocabulary_gets_whole_texts():
    student, teacher = clip({}, {}), clip({"pool_type": "eos", "eos_id": 2}, {})
    same = [TextEnd(), TextEnd(2)]
    assert text_ends(student, [teacher]) == same
    assert text_ends(student, [replace(teacher, tokenizer={**teacher.tokenizer, "kept": "0-9"})]) == [TextEnd(), None]


def loaded(model, **options):
    data = DataSpec(train=(SourceSpec(format="digits", limit=40),))
    context = Context(start_fabric(Runtime(accelerator="cpu")), data, 0, teachers=options.pop("teachers", ()))
    return next(iter(batches(model, Training(steps=1, batch_size=8), context, 1, **options)))["ids"]


def test_training_batches_have_no_padding_beyond_the_longest_text_unless_a_model_or_a_loss_reads_it():
    model = clip({}, {})
    whole = loaded(model, whole_texts=True)
    short = loaded(model)
    assert whole.shape == (8, 24) and short.shape[1] < 24
    assert torch.equal(short, whole[:, : short.shape[1]]) and not whole[:, short.shape[1] :].any()
    reader = clip({"no_causal_mask": True}, {"custom_text": True})
    assert loaded(model, teachers=(reader,)).shape == (8, 24) == loaded(reader).shape


def test_evaluation_encodes_no_padding():
    model, seen = clip({}, {}), []
    model.module.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    ids = texts([3, 7], END)
    found = runs_of(model)["text"]({"input_ids": ids})["text_embeds"]
    with torch.inference_mode():
        expected = model.module.encode_text(torch.from_numpy(ids), normalize=True)
    assert seen == [8, 24] and np.allclose(found, expected, atol=1e-6)
