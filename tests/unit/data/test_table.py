"""A table that is read from its file when needed holds what the standard library reads from it at once."""

import csv
import io
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipress.data.bad_records import refuse_too_many
from clipress.data.formats import files
from clipress.data.formats.table import Table
from clipress.data.sources import open_source
from clipress.data.spec import SourceSpec
from clipress.errors import DataError, RecipeError
from clipress.storage import cache_folder

PATHS = [
    "red.png",
    "a/blue.png",
    "./red.png",
    "a/../red.png",
    "a..b.png",
    "missing.png",
    "../out.png",
    "/etc/passwd",
    "",
]
TEXTS = ["red", ' "quoted" ', "", "\xa0", "größe", "...", "a\rb", "x" * 40, '"', "a\u2028b"]


@pytest.fixture(autouse=True)
def lenient(monkeypatch):
    """Most of these rows are broken on purpose."""
    monkeypatch.setattr(files, "refuse_too_many", lambda *_, **__: None)


def opened(path, images, **more):
    open_source.cache_clear()
    return open_source(SourceSpec(format="csv", annotations=path, images=images, **more))


def by_csv(path, images, separator, encoding):
    """Read a table with Python's text files and `csv`: the captions of every image, and the number of records that are skipped."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode(encoding)
    lines = [line.rstrip("\r\n") for line in io.StringIO(content, newline="\n")]
    reader = csv.reader((line + "\n" for line in lines), strict=True)
    texts, skipped, header = {}, 0, None
    rows = (line.split(separator) for line in lines) if separator != "," else reader
    while True:
        before = reader.line_num
        try:
            cells = next(rows)
        except StopIteration:
            return texts, skipped
        except csv.Error:
            skipped += reader.line_num - before
            continue
        if header is None:
            header = cells
        elif len(cells) == len(header):
            caption, image = (cells[header.index(key)] for key in ("title", "filepath"))
            inside = os.path.normpath(images / image).startswith(f"{images}/")
            usable = inside and (images / image).is_file() and caption.strip()
            if usable:
                texts.setdefault(image, []).append(caption)
            skipped += not usable
        else:
            skipped += any(cells)


def as_written(text, separator):
    quotes = separator == "," and any(mark in text for mark in '",\r\n')
    return '"' + text.replace('"', '""') + '"' if quotes else text


line = st.one_of(
    st.tuples(st.sampled_from([*TEXTS, "two\nlines", "a,b"]), st.sampled_from(PATHS)),
    st.tuples(st.sampled_from(TEXTS), st.sampled_from(PATHS[:3])),
    st.sampled_from(["", "\r", ",", "\t", '"', 'red","', '"x" y,red.png', '"never closed,red.png', "a,b,c", "a\tb\tc"]),
    st.binary(max_size=12),
)


@pytest.mark.parametrize("separator", [",", "\t", "||"])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "gbk"])
@given(rows=st.lists(line, max_size=12), bom=st.booleans(), ends=st.sampled_from(["\n", "\r\n"]), last=st.booleans())
@settings(deadline=None, max_examples=60)
def test_any_table_holds_what_csv_reads(tmp_path_factory, images, separator, encoding, rows, bom, ends, last):
    written = [("title", "filepath"), ("a red one", "red.png"), *rows]
    if separator != ",":
        written = [(row[0].replace("\n", " "), row[1]) if isinstance(row, tuple) else row for row in written]
    whole = [
        separator.join(as_written(cell, separator) for cell in row) if isinstance(row, tuple) else row
        for row in written
    ]
    encoded = [row.encode(encoding, "replace") if isinstance(row, str) else row for row in whole]
    encoded = [row.decode(encoding, "ignore").encode(encoding) for row in encoded]
    path = tmp_path_factory.mktemp("t") / "pairs.csv"
    path.write_bytes(b"\xef\xbb\xbf" * bom + ends.encode().join(encoded) + ends.encode() * last)
    how = {"quoted": "auto" if separator == "," else False, "encoding": encoding}
    source, (pairs, skipped) = (
        opened(path, images, separator=separator, **how),
        by_csv(path, images, separator, encoding),
    )
    found = [(source.image(index).size, *source.captions(index)) for index in range(len(source))]
    assert found == [(Image.open(images / path).size, *texts) for path, texts in pairs.items()]
    assert source.skipped == skipped


@pytest.fixture
def long_table(tmp_path, images, monkeypatch):
    """A table whose index is kept, since not all of its images are checked."""
    monkeypatch.setattr(files, "FILES_CHECKED", 4)
    monkeypatch.setenv("CLIPRESS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "pairs.csv"
    rows = "".join(f"{n}\t{'./' * n}red.png\n" for n in range(9))
    path.write_text("title\tfilepath\n\tred.png\n" + rows, encoding="utf-8")
    return path


def unread(*_, **__):
    raise AssertionError("the table was read again")


def test_a_second_opening_of_a_long_table_does_not_read_it(long_table, images, monkeypatch):
    first = opened(long_table, images)
    monkeypatch.setattr(Table, "add", unread)
    again = opened(long_table, images)
    assert [again.captions(n) for n in range(9)] == [(str(n),) for n in range(9)] and len(again) == 9
    assert (again.fingerprint, again.skipped, again.first_skipped) == (first.fingerprint, 1, "line 2: empty caption")
    with pytest.raises(AssertionError, match="read again"):
        opened(long_table, images, limit=5)


def test_a_table_that_was_edited_is_read_again(long_table, images):
    opened(long_table, images)
    long_table.write_text(long_table.read_text().replace("8\t", "eight\t"))
    assert opened(long_table, images).captions(8) == ("eight",)


@pytest.mark.parametrize("content", [b"", b"no zip"])
def test_a_damaged_index_is_built_again(long_table, images, content):
    opened(long_table, images)
    (kept,) = (cache_folder() / "tables").iterdir()
    kept.write_bytes(content)
    assert opened(long_table, images).captions(8) == ("8",)


def test_images_that_come_and_go_are_noticed(long_table, tmp_path):
    folder = tmp_path / "others"
    folder.mkdir()
    with pytest.raises(DataError, match="no usable records"):
        opened(long_table, folder)
    (folder / "red.png").touch()
    assert opened(long_table, folder).skipped == 1  # the opening that found no image has left no index
    (folder / "red.png").unlink()
    with pytest.raises(DataError, match="no usable records"):
        opened(long_table, folder)


def test_a_table_that_changes_while_it_is_in_use_gives_no_wrong_captions(long_table, images):
    source = opened(long_table, images)
    source.captions(3)
    long_table.write_text(long_table.read_text().replace("3\t", "4\t"))
    with pytest.raises(DataError, match=r"pairs\.csv has changed since it was opened"):
        source.captions(3)


def test_a_byte_order_mark_is_no_part_of_the_first_caption(tmp_path):
    path = tmp_path / "cc.tsv"
    path.write_text("\ufeffa dog\thttp://x.org/1.jpg\na cat\thttp://x.org/2.jpg\n", encoding="utf-8")
    source = open_source(SourceSpec(format="captions", annotations=path))
    assert [source.captions(index) for index in range(2)] == [("a dog",), ("a cat",)]


@pytest.mark.parametrize("quoted", ["auto", False])
@pytest.mark.parametrize("odd", ['a 5" nail', '"Stop" is on it', '"', 'x "y" z', '"a ""b"" c'])
def test_a_table_with_a_quotation_mark_that_quotes_nothing_is_read_as_written(tmp_path, images, quoted, odd):
    path = tmp_path / "pairs.tsv"
    path.write_text(f'title\tfilepath\n"a whole one"\tred.png\n{odd}\t./red.png\nred\ta/../red.png\n')
    source = opened(path, images, quoted=quoted)
    assert [source.captions(index)[0] for index in range(3)] == ['"a whole one"', odd, "red"]


def test_whether_cells_are_quoted_can_be_set(tmp_path, images):
    path = tmp_path / "pairs.tsv"
    path.write_text('title\tfilepath\n"a whole one"\tred.png\n')
    assert opened(path, images).captions(0) == (
        '"a whole one"',
    )  # it needs no quotation marks, so they are the caption's
    assert opened(path, images, quoted=True).captions(0) == ("a whole one",)
    with pytest.raises(DataError, match=r"separator of one character, found '\|\|'"):
        opened(path, images, quoted=True, separator="||")


def test_rows_of_an_image_are_merged_in_a_long_table_that_is_opened_again(long_table, images, monkeypatch):
    long_table.write_text("title\tfilepath\n" + "".join(f"{n}\t{'./' * (n % 4)}red.png\n" for n in range(9)))
    first = opened(long_table, images)
    monkeypatch.setattr(Table, "add", unread)
    again = opened(long_table, images)
    wanted = [("0", "4", "8"), ("1", "5"), ("2", "6"), ("3", "7")]
    assert [source.captions(n) for source in (first, again) for n in range(4)] == wanted * 2
    assert first.fingerprint == again.fingerprint and len(again) == 4


@pytest.mark.parametrize("encoding", ["utf-16", "no-such", "hex"])
def test_an_encoding_that_cannot_be_split_into_lines_is_refused_by_name(encoding):
    with pytest.raises(
        RecipeError, match=f"encoding: expected an encoding that writes ASCII as it is.*found '{encoding}'"
    ):
        SourceSpec(format="csv", encoding=encoding)


def test_the_fraction_of_records_that_may_be_left_out_is_a_setting(tmp_path, images, monkeypatch):
    monkeypatch.setattr(files, "refuse_too_many", refuse_too_many)
    path = tmp_path / "pairs.csv"
    path.write_text("title\tfilepath\n" + "red\tred.png\n" * 7 + "gone\tgone.png\n" * 3)
    with pytest.raises(DataError, match=r"3 of 10 records cannot be used .*At most 20% may be bad"):
        opened(path, images)
    assert opened(path, images, max_skipped=0.3).skipped == 3
    with pytest.raises(DataError, match=r"At most 0% may be bad.*'max_skipped'"):
        opened(path, images, max_skipped=0)
