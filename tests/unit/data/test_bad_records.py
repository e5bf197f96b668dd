"""Bad records are replaced by the draw alone, counted and reported; too many are an error."""

import logging
from dataclasses import dataclass, field

import pytest

from clipress.data.bad_records import BadRecord, BadRecords, read_record, refuse_too_many
from clipress.errors import DataError


@dataclass
class Holed:
    """A source of 100 records with known bad ones."""

    broken: frozenset = frozenset()
    silent: frozenset = frozenset()
    has_images: bool = True
    has_texts: bool = True
    name: str = "holed"
    reads: list = field(default_factory=list)

    def __len__(self):
        return 100

    def image(self, index):
        self.reads.append(index)
        if index in self.broken:
            raise DataError(f"{index}.jpg is not an image")
        return f"image {index}"

    def captions(self, index):
        if index in self.silent:
            raise DataError(f"{index} has no caption")
        return (f"caption {index}",)


def test_a_good_record_is_returned_unchanged():
    record = read_record(Holed(), 7, [0, 0, 0, 7])
    assert (record.index, record.image, record.captions, record.bad) == (7, "image 7", ("caption 7",), ())


def test_a_bad_record_is_replaced_by_another_with_its_own_caption():
    record = read_record(Holed(frozenset({7})), 7, [0, 0, 0, 7])
    assert record.index != 7
    assert record.image == f"image {record.index}" and record.captions == (f"caption {record.index}",)
    assert record.bad == (BadRecord("holed", 7, "7.jpg is not an image"),)


def test_a_record_with_an_unreadable_caption_is_bad():
    record = read_record(Holed(silent=frozenset({7})), 7, [0, 0, 0, 7])
    assert record.captions == (f"caption {record.index}",) and record.bad[0].reason == "7 has no caption"


def test_the_replacement_depends_on_the_draw_alone():
    broken = frozenset(range(0, 100, 2))
    first = read_record(Holed(broken), 4, [3, 0, 1, 4])
    source = Holed(broken)
    for index in (8, 3, 2):
        read_record(source, index, [3, 0, 1, index])
    assert read_record(source, 4, [3, 0, 1, 4]) == first
    others = {read_record(Holed(broken), 4, [seed, 0, epoch, 4]).index for seed in range(5) for epoch in range(5)}
    assert len(others) > 5


def test_all_bad_records_that_were_tried_are_returned():
    source = Holed(frozenset(range(90)))
    record = read_record(source, 0, [1, 0, 0, 0])
    assert [item.index for item in record.bad] == source.reads[:-1] and record.index == source.reads[-1] >= 90


def test_a_source_without_a_good_record_stops_the_run():
    with pytest.raises(DataError, match=r"20 records of source 'holed' in a row .*is not an image"):
        read_record(Holed(frozenset(range(100))), 0, [0, 0, 0, 0])


def test_one_sided_sources_return_their_side_only():
    texts = read_record(Holed(frozenset(range(100)), has_images=False), 3, [0, 0, 0, 3])
    assert texts.image is None and texts.captions == ("caption 3",)
    images = read_record(Holed(silent=frozenset(range(100)), has_texts=False), 3, [0, 0, 0, 3])
    assert images.image == "image 3" and images.captions == ()


def records(*indices):
    return [BadRecord("holed", index, "torn") for index in indices]


def test_bad_records_are_reported_once(caplog):
    counter = BadRecords()
    with caplog.at_level(logging.WARNING):
        assert counter.count(10, records(3, 4)) == records(3, 4)
        assert counter.count(10, records(3, 5)) == records(5)
    assert [f"replaced record {i} of source 'holed': torn" in caplog.text for i in (3, 4, 5)] == [True] * 3
    assert caplog.text.count("record 3 ") == 1
    assert (counter.total, counter.bad) == (24, 4)


def test_a_few_bad_records_are_accepted_in_a_short_run():
    counter = BadRecords()
    counter.count(0, records(*range(20)))
    with pytest.raises(DataError, match=r"21 of 21 records .*record 20 of source 'holed'.*At most 5%"):
        counter.count(0, records(20))


def test_five_percent_bad_records_are_accepted_in_a_long_run():
    counter = BadRecords()
    for batch in range(100):
        counter.count(95, records(*range(batch * 5, batch * 5 + 5)))
    assert counter.bad == 500
    with pytest.raises(DataError, match="501 of 10001"):
        counter.count(0, records(1))


def test_the_limit_can_be_chosen_and_zero_allows_none():
    with pytest.raises(DataError, match=r"1 of 100 records .*At most 0%.* or raise 'data\.max_replaced'\."):
        BadRecords(limit=0, setting="'data.max_replaced'").count(99, records(1))
    counter = BadRecords(limit=0.5)
    counter.count(30, records(*range(30)))
    with pytest.raises(
        DataError, match=r"31 of 61 records .*At most 50%.*Check the source's paths, or repair these records\."
    ):
        counter.count(0, records(30))


def test_a_bad_record_that_is_read_again_is_not_a_different_one():
    counter = BadRecords()
    counter.count(10, records(3, 4, 3))
    counter.count(10, records(4, 5))
    assert (counter.bad, counter.different) == (5, 3)


def test_too_many_bad_records_are_an_error_that_names_one():
    refuse_too_many("a.csv", 2, 10, "line 3")
    with pytest.raises(DataError, match=r"a\.csv: 3 of 10 records .*for example, line 3\)\. At most 20%"):
        refuse_too_many("a.csv", 3, 10, "line 3")
    refuse_too_many("a.csv", 3, 10, "line 3", least=3)
