"""Tables that pandas writes are read as pandas reads them; rows of one image are one image."""

import csv

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipress.data.sources import open_source
from clipress.data.spec import SourceSpec
from clipress.errors import DataError

pandas = pytest.importorskip("pandas")


def opened(path, images, **more):
    open_source.cache_clear()
    return open_source(SourceSpec(format="csv", annotations=path, images=images, **more))


CELLS = st.text(st.sampled_from('ab "\t\nü,'), min_size=1, max_size=6).filter(lambda text: text.strip())


@given(rows=st.lists(CELLS, min_size=1, max_size=8), quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
@settings(deadline=None, max_examples=150)
def test_a_table_that_pandas_writes_is_read_as_pandas_reads_it(tmp_path_factory, images, rows, quoting):
    path = tmp_path_factory.mktemp("t") / "pairs.tsv"
    images_of = [f"{'./' * number}red.png" for number in range(len(rows))]
    pandas.DataFrame({"title": rows, "filepath": images_of}).to_csv(path, sep="\t", index=False, quoting=quoting)
    source = opened(path, images)
    found = [text for index in range(len(source)) for text in source.captions(index)]
    assert found == pandas.read_csv(path, sep="\t", dtype=str, keep_default_na=False)["title"].tolist() == rows


@pytest.mark.parametrize("separator", [",", "\t"])
def test_rows_of_an_image_are_one_image_with_several_captions(tmp_path, images, separator):
    rows = [("red", "red.png"), ("blue", "a/blue.png"), ("also red", "red.png"), ("red again", "red.png")]
    path = tmp_path / "pairs.csv"
    frame = pandas.DataFrame([*rows, ("a,b", "a..b.png")], columns=["title", "filepath"])
    frame.to_csv(path, sep=separator, index=False)
    source = opened(path, images, separator=separator)
    groups = frame.groupby("filepath", sort=False)["title"].apply(tuple)
    assert [source.captions(index) for index in range(len(source))] == groups.tolist()
    assert [source.group(index) for index in range(3)] == [0, 1, 2] and source.num_captions == 5
    assert [source.image(index).size for index in range(3)] == [Image.open(images / one).size for one in groups.index]
    limited = opened(path, images, separator=separator, limit=2)
    assert [limited.captions(index) for index in range(2)] == [("red", "also red", "red again"), ("blue",)]
    assert len(limited) == 2


@pytest.mark.parametrize(("encoding", "text"), [("cp1252", "Café – grün"), ("gbk", "红色的车"), ("latin-1", "größe")])
def test_a_table_in_another_encoding_is_an_error_until_it_is_named(tmp_path, images, encoding, text):
    path = tmp_path / "pairs.csv"
    pandas.DataFrame({"title": ["red", text], "filepath": ["red.png", "a/blue.png"]}).to_csv(
        path, sep="\t", index=False, encoding=encoding
    )
    with pytest.raises(
        DataError, match=r"pairs\.csv, byte \d+: expected text in utf-8, found b.*'encoding', such as cp1252"
    ):
        opened(path, images)
    assert opened(path, images, encoding=encoding).captions(1) == (text,)
