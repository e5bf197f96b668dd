"""METEOR and SPICE are what their programs say: through a stand-in for `java`, and by METEOR itself where pycocoevalcap is installed."""

import logging
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from clipress.metrics import caption_java
from clipress.metrics.caption import score_captions
from clipress.metrics.caption_java import CORENLP, METEOR, SPICE, scores_by_java
from clipress.metrics.outcomes import percent, standard_error

# METEOR's statistics of a caption are here its words that any reference has, and its words; SPICE has the share of them.
JAVA = f"""#!{sys.executable}
import json, sys
options = sys.argv[1:]
def counts(text, references):
    known = {{word for one in references for word in one.split()}}
    return [sum(word in known for word in text.split()), len(text.split())]
if "-version" in options:
    sys.exit('openjdk version "VERSION"')
if "-silent" in options:
    cache, out = (options[options.index(one) + 1] for one in ("-cache", "-out"))
    items = json.load(open(options[options.index("-cache") - 1]))
    open(cache + "/parsed", "w").close()
    scores = [{{"image_id": one["image_id"], "scores": {{"All": {{"f": counts(one["test"], one["refs"])[0] / 10}}}}}} for one in items]
    json.dump(scores[::-1], open(out, "w"))
    sys.exit()
assert options[options.index("-jar") + 2 :] == ["-", "-", "-stdio", "-l", "en", "-norm"]
for line in sys.stdin:
    verb, *parts = (part.strip() for part in line.rstrip("\\n").split("|||"))
    if "fail" in line:
        sys.exit("Error: no heap")
    if verb.strip() == "SCORE":
        print(*map(float, counts(parts[-1], parts[:-1])), flush=True)
    else:
        rows = [[float(number) for number in part.split()] for part in parts]
        scores = [hits / words for hits, words in [*rows, [sum(column) for column in zip(*rows)]]]
        print(*scores, sep="\\n", flush=True)
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without Java and without the programs; `found` adds them."""
    monkeypatch.setenv("CLIPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    others = [one for one in sys.path if not Path(one, caption_java.PACKAGE).exists()]
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *others])
    caption_java.find_programs.cache_clear()

    def found(*files, version="11.0.2"):
        for name in files:
            path = tmp_path / "site" / caption_java.PACKAGE / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        if version is not None:
            java = tmp_path / "bin/java"
            java.parent.mkdir()
            java.write_text(JAVA.replace("VERSION", version))
            java.chmod(0o755)
        caption_java.find_programs.cache_clear()

    yield found
    caption_java.find_programs.cache_clear()


def test_both_are_computed_from_the_words_of_the_ptb_tokenizer(machine):
    machine(METEOR, SPICE, *CORENLP)
    found = score_captions(
        ["A dog's red bone!", "a cat", "one zebra"], [["a dog 's (red) bone"], ["A dog", "the cat"], ["a big cat"]]
    )
    hits, words = np.array([5, 2, 0]), np.array([5, 2, 2])
    np.testing.assert_allclose(found["spice"].values, hits / 10)
    assert percent(found["meteor"]) == pytest.approx(100 * hits.sum() / words.sum())
    each = hits / words
    np.testing.assert_allclose(found["meteor"].values, each - each.mean() + hits.sum() / words.sum())
    assert standard_error(found["meteor"]) == pytest.approx(100 * each.std() / np.sqrt(3))
    assert set(found) == {"cider", "bleu4", "meteor", "spice"}


def test_a_single_image_has_the_score_of_all(machine):
    machine(METEOR)
    assert scores_by_java(["a dog"], [["a cat"]])["meteor"].values.tolist() == [0.5]


@pytest.mark.parametrize(
    "files, version, has, said",
    [
        ((METEOR, SPICE, *CORENLP), None, set(), ["METEOR of captions is left out: java is not on PATH", "SPICE of captions is left out: java is not on PATH"]),
        ((), "11.0.2", set(), ["METEOR of captions is left out: meteor/meteor-1.5.jar is missing. Do: pip install 'clipress[captions]'", "SPICE"]),
        ((METEOR, SPICE), "1.8.0_302", {"meteor"}, ["stanford-corenlp-3.6.0.jar is missing. Do: python -m pycocoevalcap.spice.get_stanford_models"]),
        ((METEOR, SPICE, *CORENLP), "17.0.15", {"meteor"}, ["SPICE of captions is left out: it requires Java 8 to 14, found 17"]),
        ((METEOR, SPICE, *CORENLP), "1.8.0_302", {"meteor", "spice"}, []),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_once(machine, caplog, files, version, has, said):
    machine(*files, version=version)
    for _ in range(2):
        assert set(scores_by_java(["a dog"], [["a cat"]])) == has
    assert len(caplog.records) == len(said)
    assert all(part in record.message for part, record in zip(said, caplog.records, strict=True))


def test_a_program_that_fails_is_named_with_its_last_words(machine, caplog):
    machine(METEOR)
    with caplog.at_level(logging.WARNING):
        assert scores_by_java(["fail"], [["a cat"]]) == {}
    assert "METEOR of captions is left out" in caplog.text and "failed: Error: no heap" in caplog.text


@pytest.mark.skipif(
    not (shutil.which("java") and find_spec(caption_java.PACKAGE)), reason="requires java and pycocoevalcap"
)
def test_meteor_is_pycocoevalcap_s():
    words = [
        "a dog on a couch",
        "two dogs playing on the grass",
        "a man riding a wave on a surfboard",
        "a train",
        "",
    ]
    references = [
        ["a man 's dog is n't sitting on the couch", "the dog of a man on a red couch", "dog on a couch"],
        ["two dogs one black one white playing it 's fun", "a black dog and a white dog play"],
        ["a surfer rides a large wave", "a surfer on a big wave"],
        ["some food on a white plate", "a table with 2 plates of food"],
        ["a cat on a couch", ""],
    ]
    assert percent(scores_by_java(words, references)["meteor"]) == pytest.approx(
        100 * 0.18886541092170142, abs=1e-9
    )  # 1.2, Java 17
    from pycocoevalcap.meteor.meteor import Meteor

    # Perfect captions, whose statistics only the program itself adds up.
    words, references = [*words, "a cat on a couch", "a train"], [*references, ["a cat on a couch"], ["a train"]]
    whole, each = Meteor().compute_score(
        *({i: [one] if isinstance(one, str) else one for i, one in enumerate(rows)} for rows in (references, words))
    )
    found = scores_by_java(words, references)["meteor"]
    assert percent(found) == pytest.approx(100 * whole, abs=1e-9)
    np.testing.assert_allclose(found.values - found.values.mean(), np.array(each) - np.mean(each), atol=1e-9)
