"""Sources tell that an image was replaced by another of the same name."""

import io
import os
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from clipress.data.file_states import image_states
from clipress.data.image_list import open_images
from clipress.data.sources import open_source
from clipress.data.spec import SourceSpec

COUNT = 4


def png(number):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(file, "PNG", compress_level=0)  # all of one size
    return file.getvalue()


def write(path, content, time):
    """Write a file as if at a time in seconds."""
    path.write_bytes(content)
    os.utime(path, (time, time))


def write_tar(path, numbers, time):
    with tarfile.open(path, "w") as tar:
        for place, number in enumerate(numbers):
            for name, data in ((f"{place}.png", png(number)), (f"{place}.txt", b"a cat")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    os.utime(path, (time, time))


@pytest.fixture
def home(tmp_path):
    """Four images in files, a table of them in another order, and two shards of two."""
    home = tmp_path / "home"
    (home / "images").mkdir(parents=True)
    for number in range(COUNT):
        write(home / "images" / f"{number}.png", png(number), 1000)
    rows = [f"image {number}\timages/{number}.png" for number in (0, 1, 0, 2, 3)]
    (home / "pairs.tsv").write_text("\n".join(["title\tfilepath", *rows]) + "\n")
    for shard in range(2):
        write_tar(home / f"{shard}.tar", (2 * shard, 2 * shard + 1), 1000)
    return home


def spec(home, form):
    keys = {
        "images": {"images": home / "images"},
        "csv": {"annotations": home / "pairs.tsv"},
        "webdataset": {"shards": f"{home}/{{0..1}}.tar"},
    }
    return SourceSpec(format=form, **keys[form])


def states(home, form, check):
    source = open_source(spec(home, form))
    assert len(source) == COUNT
    return image_states(source, range(COUNT), check)


def replace(home, form, number, time):
    """Replace the image of item 1 by another one of the same size."""
    if form == "webdataset":
        write_tar(home / "0.tar", (0, number), time)
    else:
        write(home / "images" / "1.png", png(number), time)


@pytest.mark.parametrize("form", ["images", "csv", "webdataset"])
@pytest.mark.parametrize(
    ("number", "time", "noticed"),
    [
        (1, 1000, set()),
        (1, 2000, {"stat"}),  # touched
        (77, 2000, {"stat", "content"}),
        (77, 1000, {"content"}),
    ],
)
def test_a_replaced_image_has_another_state(home, form, number, time, noticed):
    checks = ("stat", "content")
    before = {check: states(home, form, check) for check in checks}
    assert all(len(set(map(tuple, found.tolist()))) == COUNT for check, found in before.items() if check == "content")
    replace(home, form, number, time)
    for check in checks:
        changed = np.flatnonzero((states(home, form, check) != before[check]).any(1)).tolist()
        with_it = [0, 1] if form == "webdataset" and check == "stat" else [1]  # a shard's time is that of its records
        assert changed == (with_it if check in noticed else [])


@pytest.mark.parametrize("form", ["images", "csv", "webdataset"])
def test_a_copy_without_times_has_the_same_content(home, form, tmp_path):
    shutil.copytree(home, tmp_path / "copy", copy_function=shutil.copyfile)
    old, new = ([states(where, form, check) for check in ("stat", "content")] for where in (home, tmp_path / "copy"))
    assert not (old[0] == new[0]).all(1).any()
    np.testing.assert_array_equal(old[1], new[1])


@pytest.mark.parametrize("check", ["stat", "content"])
def test_a_missing_image_has_a_state_of_zeros(home, check):
    source = open_source(spec(home, "images"))
    (home / "images" / "2.png").unlink()
    found = image_states(source, range(COUNT), check)
    assert [not row.any() for row in found] == [False, False, True, False]


def test_images_in_memory_and_sources_of_texts_have_states_of_zeros(home):
    (home / "c.tsv").write_text("a cat\nb\n")
    for source in (
        open_source(SourceSpec(format="digits", limit=2)),
        open_source(SourceSpec(format="captions", annotations=home / "c.tsv")),
    ):
        np.testing.assert_array_equal(image_states(source, range(2), "stat"), np.zeros((2, 2)))


@pytest.mark.parametrize("check", ["stat", "content"])
def test_lists_of_images_have_the_states_of_the_sources(home, check):
    for where, form in ((home / "images", "images"), (f"{home}/{{0..1}}.tar", "webdataset")):
        np.testing.assert_array_equal(open_images(str(where)).states(check), states(home, form, check))
