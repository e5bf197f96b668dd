"""Class lists and prompt templates in their common formats."""

import json

import open_clip
import pytest

from clipress.data.prompts import prompts_by_class, read_classes, read_prompts, read_templates
from clipress.errors import DataError


@pytest.mark.parametrize("spelled", ["a {}.", "a {c}.", "a {label}."])
def test_three_spellings_of_the_placeholder(spelled):
    assert read_templates([spelled]) == read_templates(spelled) == ("a {}.",)


@pytest.mark.parametrize("wrong", ["a photo", "a {} and {}", "a {name}", "a {} {", "{c} or {}", ""])
def test_a_template_requires_exactly_one_placeholder(wrong):
    with pytest.raises(DataError, match="one placeholder for the class name"):
        read_templates([wrong])


def test_lists_equal_open_clips():
    names = ("tench", "crêpe {odd}")
    for word, wanted in (
        ("openai", open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("simple", open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ):
        prompts = prompts_by_class(names, read_templates(word))
        assert prompts == [(name, [template(name) for template in wanted]) for name in names]


def test_imagenet_is_open_clips_list_with_its_wordnet_ids():
    found = read_classes("imagenet")
    assert found.names == tuple(open_clip.IMAGENET_CLASSNAMES) and list(found.wnids) == sorted(set(found.wnids))
    known = {"n01440764": "tench", "n02123045": "tabby cat", "n03773504": "missile", "n15075141": "toilet paper"}
    assert {wnid: found.names[found.wnids.index(wnid)] for wnid in known} == known


def test_a_list_with_and_without_wordnet_ids(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("n01440764 tench, Tinca tinca\n\nn01443537\tgoldfish\n")
    assert read_classes(path).wnids == ("n01440764", "n01443537")
    assert read_classes(path).names == ("tench, Tinca tinca", "goldfish")
    path.write_text("tench\nn01443537 goldfish\n")
    assert read_classes(path).wnids is None and read_classes(path).names == ("tench", "n01443537 goldfish")


def test_prompt_files_are_lines_or_json(tmp_path):
    lines, flat, by_class = (tmp_path / name for name in ("p.txt", "flat.json", "cupl.json"))
    lines.write_text("a cat\n\n  a dog \n")
    flat.write_text(json.dumps(["a cat", "a dog"]))
    by_class.write_text(json.dumps({"cat": ["a cat"], "dog": ["a dog"]}))
    assert read_prompts(lines) == read_prompts(flat) == read_prompts(by_class) == ["a cat", "a dog"]


@pytest.mark.parametrize("content", ["", "[]", "[1]", '{"cat": [3]}', '{"cat": {"a": "b"}}', '[" "]'])
def test_a_malformed_prompt_file_is_reported(tmp_path, content):
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"p\.json"):
        read_prompts(path)
