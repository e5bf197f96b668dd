"""Tokenizers that travel with a model: the ids of `tokenizers` itself, and one message for a file that is none."""

import base64
import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from clipress.data.packed_tokenizer import packed_from_folder, unpacked
from clipress.data.tokens import tokenizer_from_spec
from clipress.errors import ArtifactError
from clipress.models.importers import import_checkpoint
from clipress.models.load import new_model, save_for_open_clip
from clipress.models.tiny import tiny_architecture
from clipress.runtime.export_folder import Tokenizer as Described

WORDS = ["<pad>", "</s>", "<unk>", "a", "cat", "sat", ","]
SPEC = {"name": "tokenizer.json", "context_length": 6, "kwargs": {}}
TEXTS = ["a cat, sat", "a", "a cat sat a cat sat a cat", "dog"]


def made():
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


@pytest.fixture
def folder(tmp_path):
    made().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": {"content": "<pad>"}}')
    return tmp_path


def test_ids_are_those_of_the_library_with_the_end_token_kept(folder):
    spec = {**SPEC, **packed_from_folder(folder, 7)}
    theirs = made()
    theirs.enable_truncation(6)
    theirs.enable_padding(length=6)
    wanted = [row.ids for row in theirs.encode_batch(TEXTS)]
    np.testing.assert_array_equal(tokenizer_from_spec(spec)(TEXTS), wanted)
    assert wanted[2][-1] == 1 and tokenizer_from_spec(spec)([]).shape == (0, 6)
    assert json.loads(unpacked(spec)) == json.loads((folder / "tokenizer.json").read_text())
    again = json.loads(Described.model_validate(spec).model_dump_json())  # as an export and a server have it
    np.testing.assert_array_equal(tokenizer_from_spec(again)(TEXTS), wanted)


def test_texts_are_cleaned_as_open_clip_does_where_the_model_says_so(folder):
    spec = {**SPEC, **packed_from_folder(folder, 7)}
    canonical = tokenizer_from_spec({**spec, "kwargs": {"clean": "canonicalize"}})
    np.testing.assert_array_equal(canonical(["A CAT, sat."]), tokenizer_from_spec(spec)(["a cat sat"]))


def test_a_tokenizer_that_pads_in_an_unknown_way_is_left_to_others(folder, tmp_path):
    (folder / "tokenizer_config.json").write_text('{"pad_token": "<pad>", "padding_side": "left"}')
    assert packed_from_folder(folder, 7) == {}
    (folder / "tokenizer_config.json").write_text("{}")
    assert packed_from_folder(folder, 7) == {} and packed_from_folder(folder, 7, pad=0)["pad"] == 0
    (folder / "tokenizer.json").unlink()
    assert packed_from_folder(folder, 7) == {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "is no tokenizer"),
        ("tokenizer.json", "{", "tokenizer.json is not readable"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not readable JSON"),
        ("vocab.txt", "[PAD]\n[UNK]\na\n", r"its vocab.txt lacks \[CLS\], \[MASK\], \[SEP\]"),
        ("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\nc\n", "ids up to 7, its text tower knows 7 tokens"),
    ],
)
def test_a_folder_whose_tokenizer_is_damaged_or_too_large_is_one_message(folder, name, content, message):
    (folder / name).write_text(content)
    if name == "vocab.txt":
        (folder / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=message):
        packed_from_folder(folder, 7, pad=0)


BOMB = base64.b64encode(zlib.compress(b" " * 70_000_000)).decode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "not base64"}, "cannot be unpacked"),
        ({"file": base64.b64encode(b"not zlib").decode()}, "cannot be unpacked"),
        ({"file": BOMB}, "longer than 64,000,000 bytes"),
        ({"file": 7}, "cannot be unpacked"),
        ({"file": None}, "lacks its file"),
        ({"pad": -1}, "expected the id of padding, found -1"),
        ({"kwargs": {"strip_sep_token": True}}, "takes the setting clean alone"),
        ({"kwargs": {"clean": "well"}}, "clean is .well.\\. Known: canonicalize"),
    ],
)
def test_a_damaged_mapping_is_one_message(folder, change, message):
    with pytest.raises(ArtifactError, match=message):
        tokenizer_from_spec({**SPEC, **packed_from_folder(folder, 7), **change})


def test_a_folder_of_open_clips_keeps_its_tokenizer(folder, tmp_path):
    architecture = tiny_architecture()
    architecture["text_cfg"] |= {"hf_tokenizer_name": "tokenizer.json", "tokenizer_kwargs": {"clean": "whitespace"}}
    model = new_model(architecture, 0)
    spec = {**model.tokenizer, **packed_from_folder(folder, 7)}
    assert save_for_open_clip(replace(model, tokenizer=spec), tmp_path / "hub")
    again = import_checkpoint(tmp_path / "hub")
    assert again.tokenizer == spec
    assert json.loads((tmp_path / "hub" / "tokenizer_config.json").read_text())["pad_token"] == "<pad>"
