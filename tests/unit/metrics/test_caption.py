"""CIDEr and BLEU-4 are pycocoevalcap's, per image and over a set.

Its own values (1.2, words split by Stanford's PTB tokenizer 3.4.1 under Java 17) are stored here: it brings 100 MB of METEOR's tables.
"""

import numpy as np
import pytest

from clipress.errors import DataError
from clipress.metrics.caption import ptb_like_words, score_captions
from clipress.metrics.outcomes import paired_difference, percent, standard_error

REFERENCES = [
    [
        "A man's dog isn't sitting on the couch.",
        "The dog of a man, on a red couch",
        "a dog near a couch (red)",
        "A dog that doesn't sit",
        "dog on a couch",
    ],
    [
        "Two dogs - one black, one white -- playing; it's fun!",
        "two dogs playing on the grass.",
        "A black dog and a white dog play.",
        "two dogs play together",
        "Two black-and-white dogs in the grass at 5:30 p.m.",
    ],
    ["A man riding a wave on top of a surfboard .", "a surfer rides a large wave", 'A surfer on a "big" wave'],
    ["a cat sitting on a couch next to a dog", "A cat and a dog are on the couch", "cat, dog and couch"],
    ["a plate of food on a table", "some food on a white plate", "A table with 2 plates of food."],
]
CAPTIONS = [
    "a dog on a couch",
    "two dogs playing on the grass",
    "a man riding a wave on a surfboard",
    "a dog and a dog on a couch",
    "a train",
]
CIDER = [2.2961604385, 2.930510017, 2.6637224933, 1.4027296485, 0.0]
BLEU4 = 0.6533572547


def draws(seed, images=300):
    """Return captions and references that share words to a random degree."""
    rng, words = (
        np.random.default_rng(seed),
        np.array("a the dog cat sits on red sofa grass with big two in and".split()),
    )
    references = [[" ".join(rng.choice(words, rng.integers(4, 9))) for _ in range(3)] for _ in range(images)]
    return [texts[0] if rng.random() < 0.4 else " ".join(rng.choice(words, 7)) for texts in references], references


def test_they_are_pycocoevalcap_s():
    found = score_captions(CAPTIONS, REFERENCES)
    np.testing.assert_allclose(found["cider"].values, CIDER, atol=1e-9)
    assert percent(found["cider"]) == pytest.approx(100 * np.mean(CIDER))
    assert percent(found["bleu4"]) == pytest.approx(100 * BLEU4)


@pytest.mark.parametrize(
    "text, words",
    [
        ("A man's dog isn't here; they've run.", "a man 's dog is n't here they 've run"),
        ('The "STOP" sign (red) costs $1,000.50 at 5:30 p.m.', "the stop sign -lrb- red -rrb- costs $ 1,000.50 at 5:30 p.m."),
        ("a black-and-white t-shirt, it can't, cannot, gonna sit!", "a black-and-white t-shirt it ca n't can not gon na sit"),
        ("the girls’ “team” – Mr. Smith at 50% off & o'clock", "the girls team mr. smith at 50 % off & o'clock"),
        ("a toy/truck #5 in the 1990's with naïve café...", "a toy/truck # 5 in the 1990 's with naïve café"),
    ],
)  # fmt: skip
def test_words_are_split_as_the_ptb_tokenizer_does(text, words):
    assert ptb_like_words(text) == words.split()


def test_a_perfect_caption_has_bleu_100_and_a_short_one_is_punished():
    texts = [["a red dog on a green sofa"], ["two cats in a big box"]]
    assert percent(score_captions([one[0] for one in texts], texts)["bleu4"]) == pytest.approx(100)
    short = score_captions(["a red dog on", "two cats in a big"], texts)["bleu4"]
    assert percent(short) == pytest.approx(100 * np.exp(1 - 13 / 9))  # all n-grams right, 9 words for 13


def test_captions_without_a_common_word_or_too_short_score_nothing():
    for caption in ("zebra zebra", "a", ""):
        found = score_captions([caption] * 2, [["a red dog on a sofa"], ["a cat"]])
        assert percent(found["bleu4"]) == 0 and standard_error(found["bleu4"]) == 0
        assert percent(found["cider"]) == pytest.approx(0)


def test_the_standard_error_is_that_of_images_drawn_again():
    captions, references = draws(0)
    found, rng = score_captions(captions, references), np.random.default_rng(1)
    blocks = {name: {k: np.reshape(v, (300, -1)) for k, v in vars(one).items() if k in ("values", "weights") and v is not None} for name, one in found.items()}  # fmt: skip
    drawn = {"cider": [], "bleu4": []}
    for _ in range(400):
        rows = rng.integers(0, 300, 300)
        drawn["cider"].append(100 * blocks["cider"]["values"][rows].mean())
        values, weights = (blocks["bleu4"][key][rows] for key in ("values", "weights"))
        *precisions, ratio = (values * weights).sum(0) / weights.sum(0)
        drawn["bleu4"].append(100 * np.prod(precisions) ** 0.25 * np.exp(min(0, 1 - 1 / ratio)))
    for name, again in drawn.items():
        assert standard_error(found[name]) == pytest.approx(np.std(again), rel=0.15)


def test_two_models_are_compared_on_the_same_images():
    captions, references = draws(0)
    worse = [texts[0][:15] if number % 5 else text for number, (text, texts) in enumerate(zip(captions, references, strict=True))]  # fmt: skip
    for name, first in score_captions(captions, references).items():
        second = score_captions(worse, references)[name]
        difference = paired_difference(first, second)
        assert difference.value == pytest.approx(percent(first) - percent(second))
        assert difference.low < difference.value < difference.high


def test_an_image_without_references_is_refused():
    with pytest.raises(DataError, match="expected references for each of 2 images, found 1"):
        score_captions(["a", "b"], [["a"], []])
