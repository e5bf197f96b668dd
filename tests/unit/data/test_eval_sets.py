"""A record of an evaluation set that cannot be read is left out and named; the others count as they would without it."""

import json

import numpy as np
import pytest
from PIL import Image

from clipress.data.eval_sets import EvalSet, evalsets, on_readable, unread_in
from clipress.data.sources import open_source
from clipress.data.spec import SourceSpec
from clipress.data.transforms import Preprocess
from clipress.errors import DataError
from clipress.metrics.evaluate import evaluate_items
from clipress.metrics.outcomes import percents

PREPROCESS = Preprocess(size=8)


@pytest.fixture
def pairs(tmp_path):
    """Ten images with two captions each, of which two are damaged, and a list of the eight others."""
    rng, rows = np.random.default_rng(0), []
    for number in range(10):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": [f"a {number}", f"b {number}"]})
    for number in (3, 7):
        path = tmp_path / f"{number}.png"
        path.write_bytes(path.read_bytes()[:200])
    (tmp_path / "all.json").write_text(json.dumps(rows))
    (tmp_path / "good.json").write_text(json.dumps([row for row in rows if row["image"] not in ("3.png", "7.png")]))
    return tmp_path


def opened(path, **more):
    open_source.cache_clear()
    return evalsets([SourceSpec(format="karpathy", annotations=path, **more)])


def evaluated(sets):
    def encode_image(pixels):
        return pixels.reshape(len(pixels), -1)[:, :32]

    def encode_text(ids):
        return np.random.default_rng(ids[:, 0]).standard_normal((len(ids), 32)).astype(np.float32)

    def tokenize(texts):
        return np.asarray([[sum(map(ord, text))] for text in texts])

    return percents(evaluate_items(encode_image, encode_text, sets, PREPROCESS, tokenize))


def test_a_damaged_image_is_left_out_and_the_others_count_as_without_it(pairs, caplog):
    sets = opened(pairs / "all.json")
    assert on_readable(evaluated, sets) == evaluated(opened(pairs / "good.json"))
    assert [name in reason for name, reason in zip(("3.png", "7.png"), sets[0].unread, strict=True)] == [True, True]
    assert "left out" in caplog.text and "3.png" in caplog.text
    assert on_readable(evaluated, sets) == evaluated(sets)  # they stay out


def test_a_set_that_can_be_read_is_not_looked_through(pairs):
    sets = opened(pairs / "good.json")
    on_readable(evaluated, sets)
    assert sets[0].unread is None


def test_a_set_without_any_readable_image_is_an_error(pairs):
    for number in range(10):
        (pairs / f"{number}.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"10 of 10 records cannot be used"):
        on_readable(evaluated, opened(pairs / "all.json"))


def test_a_limit_of_zero_allows_no_damaged_image(pairs):
    with pytest.raises(DataError, match=r"2 of 10 records .*At most 0% may be bad.*raise the source's 'max_skipped'"):
        on_readable(evaluated, opened(pairs / "all.json", max_skipped=0))


@pytest.mark.parametrize("side", ["captions", "answers"])
def test_a_record_whose_texts_cannot_be_read_is_left_out_too(side):
    class Torn:
        """Five questions, of which the third has texts that cannot be read."""

        name, has_images, has_texts, has_answers, has_pairs, has_masks = "torn", False, True, True, False, False

        def __len__(self):
            return 5

        def __getattr__(self, what):
            def read(index):
                if index == 2 and what == side:
                    raise DataError(f"record {index}: not in UTF-8")
                return (f"{what} {index}",)

            return read

    one = EvalSet(Torn(), None)
    found = on_readable(lambda sets: getattr(sets[0], side)(), [one])
    assert found == [(f"{side} {index}",) for index in (0, 1, 3, 4)] and one.unread == ("record 2: not in UTF-8",)
    assert unread_in([one]) == {"torn": 1}
