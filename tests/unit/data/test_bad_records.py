"""What cannot be read is replaced in a way that depends on the draw alone, named, counted, and not too often."""

import logging
from dataclasses import dataclass, field

import pytest

from clipress.data.bad_records import Broken, BrokenRecords, readable
from clipress.errors import DataError


@dataclass
class Holed:
    """A source of 100 whose broken records are known."""

    broken: frozenset = frozenset()
    silent: frozenset = frozenset()
    has_images: bool = True
    has_texts: bool = True
    name: str = "holed"
    asked: list = field(default_factory=list)

    def __len__(self):
        return 100

    def image(self, index):
        self.asked.append(index)
        if index in self.broken:
            raise DataError(f"{index}.jpg is not a picture")
        return f"picture {index}"

    def captions(self, index):
        if index in self.silent:
            raise DataError(f"{index} has no caption")
        return (f"caption {index}",)


def test_a_record_that_can_be_read_is_read_as_it_is():
    record = readable(Holed(), 7, [0, 0, 0, 7])
    assert (record.index, record.image, record.captions, record.broken) == (7, "picture 7", ("caption 7",), ())


def test_another_record_takes_the_place_of_a_broken_one_and_brings_its_own_caption():
    record = readable(Holed(frozenset({7})), 7, [0, 0, 0, 7])
    assert record.index != 7
    assert record.image == f"picture {record.index}" and record.captions == (f"caption {record.index}",)
    assert record.broken == (Broken("holed", 7, "7.jpg is not a picture"),)


def test_a_caption_that_cannot_be_read_is_a_broken_record_too():
    record = readable(Holed(silent=frozenset({7})), 7, [0, 0, 0, 7])
    assert record.captions == (f"caption {record.index}",) and record.broken[0].reason == "7 has no caption"


def test_the_replacement_depends_on_the_draw_alone():
    broken = frozenset(range(0, 100, 2))
    first = readable(Holed(broken), 4, [3, 0, 1, 4])
    source = Holed(broken)
    for index in (8, 3, 2):
        readable(source, index, [3, 0, 1, index])
    assert readable(source, 4, [3, 0, 1, 4]) == first
    others = {readable(Holed(broken), 4, [seed, 0, epoch, 4]).index for seed in range(5) for epoch in range(5)}
    assert len(others) > 5


def test_all_broken_records_that_were_tried_are_named():
    source = Holed(frozenset(range(90)))
    record = readable(source, 0, [1, 0, 0, 0])
    assert [item.index for item in record.broken] == source.asked[:-1] and record.index == source.asked[-1] >= 90


def test_a_source_that_cannot_be_read_at_all_stops_the_run():
    with pytest.raises(DataError, match=r"20 records of source 'holed' in a row .*is not a picture"):
        readable(Holed(frozenset(range(100))), 0, [0, 0, 0, 0])


def test_one_sided_sources_give_their_side_only():
    texts = readable(Holed(frozenset(range(100)), has_images=False), 3, [0, 0, 0, 3])
    assert texts.image is None and texts.captions == ("caption 3",)
    images = readable(Holed(silent=frozenset(range(100)), has_texts=False), 3, [0, 0, 0, 3])
    assert images.image == "picture 3" and images.captions == ()


def records(*indices):
    return [Broken("holed", index, "torn") for index in indices]


def test_broken_records_are_named_once(caplog):
    count = BrokenRecords()
    with caplog.at_level(logging.WARNING):
        assert count.see(10, records(3, 4)) == records(3, 4)
        assert count.see(10, records(3, 5)) == records(5)
    assert [f"record {i} of source 'holed' is replaced: torn" in caplog.text for i in (3, 4, 5)] == [True] * 3
    assert caplog.text.count("record 3 ") == 1
    assert (count.looked_at, count.broken) == (24, 4)


def test_a_few_are_borne_however_short_the_run():
    count = BrokenRecords()
    count.see(0, records(*range(20)))
    with pytest.raises(DataError, match=r"21 of 21 records .*record 20 of source 'holed'.*At most 5%"):
        count.see(0, records(20))


def test_a_twentieth_is_borne_in_a_long_run():
    count = BrokenRecords()
    for batch in range(100):
        count.see(95, records(*range(batch * 5, batch * 5 + 5)))
    assert count.broken == 500
    with pytest.raises(DataError, match="501 of 10001"):
        count.see(0, records(1))


def test_the_limit_can_be_chosen():
    with pytest.raises(DataError, match="At most 0%"):
        BrokenRecords(limit=0, least=0).see(99, records(1))
