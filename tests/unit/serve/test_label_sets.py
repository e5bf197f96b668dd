"""The cache of label sets: the least recently used set is dropped first, and memory is limited."""

import numpy as np

from clipress.serve.label_sets import LabelSets

CLASSES = np.ones((2, 4), np.float32)  # 32 bytes, plus 4 for names.


def key(name):
    return (name, "b"), ("{}",)


def test_the_least_recently_used_set_is_dropped_first():
    sets = LabelSets(2 * 36 + 35)
    for name in "ac":
        sets.put(key(name), CLASSES)
    sets.get(key("a"))
    sets.put(key("d"), CLASSES)
    assert [sets.get(key(name)) is CLASSES for name in "acd"] == [True, False, True]


def test_a_set_that_is_too_large_is_not_kept_and_evicts_nothing():
    sets = LabelSets(40)
    sets.put(key("a"), CLASSES)
    sets.put(key("c"), np.ones((2, 5), np.float32))
    assert sets.get(key("a")) is CLASSES and sets.get(key("c")) is None


def test_the_same_set_takes_its_memory_once():
    sets = LabelSets(2 * 36)
    for name in "aaac":
        sets.put(key(name), CLASSES)
    assert sets.get(key("a")) is CLASSES and sets.get(key("c")) is CLASSES


def test_labels_and_templates_are_distinct_parts_of_the_key():
    sets = LabelSets(1000)
    sets.put((("a", "b"), ("{}",)), CLASSES)
    assert sets.get((("a",), ("b", "{}"))) is None and sets.get((("a", "b"), ("{} ",))) is None


def test_without_memory_nothing_is_kept():
    sets = LabelSets(0)
    sets.put(key("a"), CLASSES)
    assert sets.get(key("a")) is None
