"""Readers return what was written, in the exact formats of published datasets."""

import csv
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipress.data.formats import csv as csv_format
from clipress.data.formats import files
from clipress.data.formats.files import Strings, images_under
from clipress.data.formats.text import pre_caption, pre_question
from clipress.data.sources import open_source
from clipress.data.spec import SourceSpec
from clipress.data.transforms import FORMATS
from clipress.errors import DataError


def save_image(path, colour="red", size=(12, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def images(tmp_path):
    for name in ("red", "green", "blue"):
        save_image(tmp_path / "images" / f"{name}.png", name)
    return tmp_path / "images"


def written(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return path


def captions(source):
    return [list(source.captions(i)) for i in range(len(source))]


@given(st.lists(st.text()))
@settings(deadline=None, max_examples=50)
def test_strings_are_read_as_written(texts):
    kept = Strings(texts)
    assert [kept[i] for i in range(len(kept))] == texts
    kept = pickle.loads(pickle.dumps(kept))
    assert [kept[i] for i in range(len(kept))] == texts


def test_file_names_that_are_not_unicode_are_read_as_written():
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    assert Strings([name])[0] == name


# csv


def test_a_caption_may_contain_anything_but_a_newline(tmp_path, images):
    odd = ["a\u2028b", "form\x0cfeed", "carriage\rreturn", "next\x85line", '"', "NaN", "it's 5\\t"]
    rows = "".join(f"{text}\tred.png\n" for text in odd)
    table = written(tmp_path / "a.csv", "title\tfilepath\n" + rows)
    assert captions(open_source(SourceSpec(format="csv", annotations=table, images=images))) == [odd]


def test_windows_line_endings_and_a_byte_order_mark_are_accepted(tmp_path, images):
    table = written(tmp_path / "a.csv", "\ufefftitle\tfilepath\r\na red one\tred.png\r\n\r\n")
    source = open_source(SourceSpec(format="csv", annotations=table, images=images))
    assert captions(source) == [["a red one"]] and source.image(0).size == (12, 9) and source.skipped == 0


def test_commas_inside_quotes_belong_to_the_caption(tmp_path, images):
    rows = 'filepath,title\nred.png,"red, and ""square"""\nblue.png,blue\n'
    table = written(tmp_path / "a.csv", rows)
    source = open_source(SourceSpec(format="csv", annotations=table, images=images, separator=","))
    assert captions(source) == [['red, and "square"'], ["blue"]]


def test_a_badly_quoted_row_is_skipped_and_its_neighbours_are_kept(tmp_path, images):
    rows = (
        "filepath,title\n"
        + "".join(f"{'./' * n}red.png,red\n" for n in range(4))
        + 'blue.png,"blue" sky\ngreen.png,green\n'
    )
    table = written(tmp_path / "a.csv", rows)
    source = open_source(SourceSpec(format="csv", annotations=table, images=images, separator=","))
    assert captions(source)[-1] == ["green"] and len(source) == 5
    assert source.skipped == 1 and source.first_skipped.startswith("line 6")


def test_the_columns_can_have_other_names(tmp_path, images):
    table = written(tmp_path / "a.csv", "image|text\nred.png|red\n")
    keys = {"image_key": "image", "caption_key": "text", "separator": "|"}
    assert captions(open_source(SourceSpec(format="csv", annotations=table, images=images, **keys))) == [["red"]]
    with pytest.raises(DataError, match="'title' and 'filepath'"):
        open_source(SourceSpec(format="csv", annotations=table, images=images, separator="|"))


def test_files_beyond_the_first_ones_are_checked_only_if_set(tmp_path, images, monkeypatch):
    monkeypatch.setattr(files, "FILES_CHECKED", 8)
    table = written(
        tmp_path / "a.csv",
        "title\tfilepath\n" + "".join(f"red\t{'./' * n}red.png\n" for n in range(9)) + "gone\tgone.png\n",
    )
    source = open_source(SourceSpec(format="csv", annotations=table, images=images))
    assert len(source) == 10 and source.skipped == 0
    with pytest.raises(DataError, match=r"gone\.png: no such file"):
        source.image(9)
    source = open_source(SourceSpec(format="csv", annotations=table, images=images, check=True))
    assert len(source) == 9 and source.skipped == 1


def test_a_wrong_folder_is_reported_before_reading_the_whole_table(tmp_path, images, monkeypatch):
    monkeypatch.setattr(files, "CHECKED_EVERY", 5)
    table = written(tmp_path / "a.csv", "title\tfilepath\n" + "red\twrong/red.png\n" * 50)
    with pytest.raises(DataError, match=r"5 of 5 records.*wrong/red\.png"):
        open_source(SourceSpec(format="csv", annotations=table, images=images))


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "a/../../secret.png", "..", ""])
def test_no_path_leads_out_of_the_images_folder(tmp_path, images, path):
    save_image(tmp_path / "secret.png")
    table = written(tmp_path / "a.csv", "title\tfilepath\n" + "red\tred.png\n" * 4 + f"bad\t{path}\n")
    source = open_source(SourceSpec(format="csv", annotations=table, images=images))
    assert captions(source) == [["red"] * 4] and source.skipped == 1


def test_links_inside_the_images_folder_are_followed(tmp_path, images):
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "linked").symlink_to(images)
    table = written(tmp_path / "a.csv", "title\tfilepath\nred\tlinked/red.png\n")
    source = open_source(SourceSpec(format="csv", annotations=table, images=tmp_path / "all"))
    assert source.image(0).getpixel((0, 0)) == (255, 0, 0)


def test_limit_takes_the_first_records(tmp_path, images):
    table = written(tmp_path / "a.csv", "title\tfilepath\nred\tred.png\nblue\tblue.png\nbroken row\n")
    source = open_source(SourceSpec(format="csv", annotations=table, images=images, limit=1))
    assert captions(source) == [["red"]] and source.skipped == 0


def test_the_fingerprint_depends_on_the_content(tmp_path, images):
    def fingerprint_of(text, **more):
        table = written(tmp_path / "a.csv", "title\tfilepath\n" + text)
        open_source.cache_clear()
        return open_source(SourceSpec(format="csv", annotations=table, images=images, **more)).fingerprint

    first = fingerprint_of("red\tred.png\n")
    assert fingerprint_of("red\tred.png\n") == first
    others = {
        fingerprint_of("Red\tred.png\n"),
        fingerprint_of("red\tblue.png\n"),
        fingerprint_of("red\tred.png\nx\tred.png\n"),
    }
    assert len(others | {first}) == 4
    assert fingerprint_of("Red.\tred.png\n", text_normaliser="blip") == first


# blip


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('A "Stop" sign (red), 5:30 p.m.!', "a stop sign red , 5 30 p m"),
        ("  Two#dogs;~run * fast  ", "two dogs run fast"),
        ("tab\tstays, dash-too", "tab\tstays, dash-too"),
        (" ".join(f"w{i}" for i in range(40)), " ".join(f"w{i}" for i in range(30))),
    ],
)
def test_captions_can_be_changed_as_blip_does(tmp_path, images, text, wanted):
    path = written(tmp_path / "a.json", json.dumps([{"image": "red.png", "caption": [text]}]))
    spec = {"format": "karpathy", "annotations": path, "images": images}
    assert captions(open_source(SourceSpec(**spec, text_normaliser="blip"))) == [[wanted]]
    assert captions(open_source(SourceSpec(**spec))) == [[text]]


def test_statements_and_questions_are_normalised_as_blip_does():
    text = 'What "colour" is  it: RED (or blue)?  '
    assert pre_caption(text, 4) == "what colour is it" and pre_caption(text) == "what colour is it red or blue ?"
    assert pre_question(text) == "what colour is  it red or blue?" and pre_question(text, 3) == "what colour is"
    many = " ".join(f"w{i}" for i in range(60))
    assert len(pre_question(many).split()) == 50 and len(pre_caption(many, 40).split()) == 40


# karpathy


def test_a_string_is_one_caption_in_a_test_file(tmp_path, images):
    rows = [{"image": "red.png", "caption": "a red one"}, {"image": "blue.png", "caption": ["blue", "sky"]}]
    path = written(tmp_path / "coco_karpathy_test.json", json.dumps(rows))
    source = open_source(SourceSpec(format="karpathy", annotations=path, images=images))
    assert captions(source) == [["a red one"], ["blue", "sky"]]


def test_images_that_share_an_image_id_match_each_others_captions(tmp_path, images):
    rows = [
        {"image": "red.png", "caption": "a", "image_id": "x_1"},
        {"image": "blue.png", "caption": "b", "image_id": "x_2"},
        {"image": "green.png", "caption": "c", "image_id": "x_1"},
        {"image": "red.png", "caption": "d", "image_id": "x_1"},
    ]
    path = written(tmp_path / "coco_karpathy_train.json", json.dumps(rows))
    source = open_source(SourceSpec(format="karpathy", annotations=path, images=images))
    assert captions(source) == [["a", "d"], ["b"], ["c"]]
    assert source.group(0) == source.group(2) != source.group(1)


@pytest.mark.parametrize("row", [{}, 3, {"image": "red.png"}, {"image": "red.png", "caption": []}, {"caption": "a"}])
def test_a_malformed_row_is_skipped_and_counted(tmp_path, images, row):
    rows = [{"image": f"{name}.png", "caption": name} for name in ("red", "green", "blue")]
    path = written(tmp_path / "a.json", json.dumps([*rows, row]))
    with pytest.raises(DataError, match=r"1 of 4 records.*row 3"):
        open_source(SourceSpec(format="karpathy", annotations=path, images=images))


# coco


def coco(tmp_path, images, annotations):
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    return written(tmp_path / "captions_val2017.json", json.dumps(content))


def test_coco_lists_images_by_id_with_all_their_captions(tmp_path):
    save_image(tmp_path / "val2014" / "COCO_val2014_000000000042.jpg", "blue")
    save_image(tmp_path / "val2014" / "000000000007.jpg", "red")
    images = [
        {"id": 42, "file_name": "COCO_val2014_000000000042.jpg", "height": 9, "width": 12, "license": 1},
        {"id": 7, "file_name": "000000000007.jpg", "height": 9, "width": 12, "license": 1},
    ]
    pairs = [(1, 42, "blue"), (2, 7, "red"), (3, 42, "also blue"), (4, 42, "blue")]
    annotations = [{"id": i, "image_id": image, "caption": text} for i, image, text in pairs]
    path = coco(tmp_path, images, annotations)
    source = open_source(SourceSpec(format="coco", annotations=path, images=tmp_path / "val2014"))
    assert captions(source) == [["red"], ["blue", "also blue", "blue"]]
    assert source.image(0).getpixel((0, 0))[0] > 200 and source.image(1).getpixel((0, 0))[2] > 200
    assert source.group(0) != source.group(1)


def test_coco_skips_dangling_references(tmp_path):
    for i in range(8):
        save_image(tmp_path / f"{i}.jpg")
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(8)]
    annotations = [{"id": i, "image_id": i, "caption": "x"} for i in range(7)]
    strange = [{"id": 9, "image_id": 99, "caption": "lost"}]
    path = coco(tmp_path, images, annotations + strange)
    with pytest.raises(DataError, match=r"2 of 9 records .*annotation 7"):
        open_source(SourceSpec(format="coco", annotations=path, images=tmp_path))
    path = coco(tmp_path, images, annotations)
    open_source.cache_clear()
    source = open_source(SourceSpec(format="coco", annotations=path, images=tmp_path))
    assert len(source) == 7 and source.first_skipped == "image 7: it has no caption"


@pytest.mark.parametrize("content", ["[]", "{}", '{"images": 3, "annotations": []}', "{", ""])
def test_a_file_that_is_not_coco_is_reported(tmp_path, content):
    path = written(tmp_path / "captions.json", content)
    with pytest.raises(DataError, match=r"captions\.json"):
        open_source(SourceSpec(format="coco", annotations=path, images=tmp_path))


# captions


@pytest.mark.parametrize(
    "rows",
    [
        ['"a" dog\thttp://x.org/1.jpg', "NA\thttp://x.org/2.jpg"],
        ['http://x.org/1.jpg\t"a" dog', "https://x.org/2.jpg\tNA"],
        ["caption\turl", '"a" dog\thttp://x.org/1.jpg', "NA\thttp://x.org/2.jpg"],
        ["URL\tCaption", 'http://x.org/1.jpg\t"a" dog', "http://x.org/2.jpg\tNA"],
        ['"a" dog', "NA"],
    ],
)
def test_raw_conceptual_captions_are_texts_without_images(tmp_path, rows):
    path = written(tmp_path / "cc.tsv", "\n".join(rows) + "\n")
    source = open_source(SourceSpec(format="captions", annotations=path))
    assert captions(source) == [['"a" dog'], ["NA"]]
    assert source.has_texts and not source.has_images
    assert source.group(0) != source.group(1)
    with pytest.raises(DataError, match="has texts only"):
        source.image(0)


def test_an_unrelated_table_is_not_read_as_captions(tmp_path):
    path = written(tmp_path / "cc.tsv", "one\ttwo\tthree\n")
    with pytest.raises(DataError, match="3 cells in the first line, 0 of them URLs"):
        open_source(SourceSpec(format="captions", annotations=path))


# images


def test_a_folder_of_images_has_no_texts(tmp_path, images):
    save_image(images / "deep" / "er" / "one.JPEG")
    written(images / "note.txt", "no image")
    written(images / ".hidden.png", "no image")
    source = open_source(SourceSpec(format="images", images=images))
    assert [source.paths[i] for i in range(len(source))] == ["blue.png", "green.png", "red.png", "deep/er/one.JPEG"]
    assert source.captions(0) == () and source.has_images and not source.has_texts


def test_a_folder_has_images_of_every_format_that_is_read(tmp_path):
    kinds = [*(["avif"] if "AVIF" in FORMATS else []), "bmp", "jpeg", "jpg", "png", "tif", "tiff", "webp"]
    for kind in kinds:
        Image.new("RGB", (16, 16)).save(tmp_path / f"one.{kind}")
    source = open_source(SourceSpec(format="images", images=tmp_path))
    assert [source.paths[i] for i in range(len(source))] == [f"one.{kind}" for kind in kinds]
    assert all(source.image(i).size == (16, 16) for i in range(len(source)))


def test_a_list_selects_images(tmp_path, images):
    listed = written(tmp_path / "list.tsv", "filepath\tscore\tprompt\nred.png\t0.3\ta\nblue.png\t0.2\tb\n")
    source = open_source(SourceSpec(format="images", images=images, annotations=listed))
    assert [source.image(i).getpixel((0, 0)) for i in range(2)] == [(255, 0, 0), (0, 0, 255)]


def test_circular_links_terminate(tmp_path, images):
    (images / "again").symlink_to(images)
    assert list(images_under(images)) == ["blue.png", "green.png", "red.png"]


# folder


def class_folders(root, names):
    for name in names:
        save_image(root / name / "x.JPEG")
    return root


def test_class_folders_are_named_by_a_list_with_wordnet_ids(tmp_path):
    root = class_folders(tmp_path / "imagenet-r", ["n01443537", "n01440764"])
    rows = "n01440764 tench, Tinca tinca\nn01443537 goldfish\nn01484850 great white shark\n"
    mapping = written(tmp_path / "LOC_synset_mapping.txt", rows)
    source = open_source(SourceSpec(format="folder", images=root, classes=mapping, templates=["a {label}."]))
    assert source.classes.names == ("tench, Tinca tinca", "goldfish")
    assert {source.paths[i].split("/")[0]: source.group(i) for i in range(2)} == {"n01440764": 0, "n01443537": 1}
    assert source.captions(1) == ("a goldfish.",)


def test_subsets_of_imagenet_use_the_names_of_imagenet(tmp_path):
    from open_clip import IMAGENET_CLASSNAMES

    missiles = ["n03773504", "n04008634"]  # Labels 657 and 744 are both called missile.
    root = class_folders(tmp_path / "imagenet-a", ["n01498041", *missiles])
    source = open_source(SourceSpec(format="folder", images=root, classes="imagenet", templates="openai"))
    assert source.classes.names == (IMAGENET_CLASSNAMES[6], "missile", "missile") == ("stingray", "missile", "missile")
    assert [source.group(i) for i in range(3)] == [0, 1, 2]
    assert len(source.captions(0)) == 80 and source.captions(0)[0] == "a bad photo of a stingray."


def test_numbered_folders_are_imagenet_labels(tmp_path):
    root = class_folders(tmp_path / "imagenetv2", ["0", "10", "999"])
    source = open_source(SourceSpec(format="folder", images=root, classes="imagenet"))
    labels = {source.paths[i].split("/")[0]: source.group(i) for i in range(3)}
    assert labels == {"0": 0, "10": 10, "999": 999} and len(source.classes.names) == 1000
    assert source.classes.names[10] == "brambling"


def test_a_list_that_does_not_fit_the_folders_is_reported(tmp_path):
    root = class_folders(tmp_path / "set", ["a", "b"])
    names = written(tmp_path / "names.txt", "one\ntwo\nthree\n")
    with pytest.raises(DataError, match=r"expected 2 class names, one per folder in .*, found 3"):
        open_source(SourceSpec(format="folder", images=root, classes=names))
    with pytest.raises(DataError, match="2 class folders are missing from imagenet, such as 'a'"):
        open_source(SourceSpec(format="folder", images=root, classes="imagenet"))
    numbers = class_folders(tmp_path / "numbers", ["0", "3"])
    with pytest.raises(DataError, match="expected more than 3 class names, since that is a label; found 3"):
        open_source(SourceSpec(format="folder", images=numbers, classes=names))


def test_class_names_of_a_subset_are_the_matching_imagenet_columns(tmp_path):
    from open_clip import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    wnids = ImageNetInfo().label_names()
    columns = np.sort(np.random.default_rng(0).choice(1000, 5, replace=False))
    root = class_folders(tmp_path / "r", [wnids[column] for column in columns])
    source = open_source(SourceSpec(format="folder", images=root, classes="imagenet", templates="simple"))
    assert source.classes.names == tuple(IMAGENET_CLASSNAMES[column] for column in columns)
    assert len(source.classes.templates) == 7


# tables that stay in their file

CELL = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1, max_size=8)
PAIRS = st.lists(st.tuples(CELL.filter(lambda text: text.strip()), CELL), min_size=1, max_size=20)


@pytest.mark.parametrize("separator", [",", "\t"])
@given(PAIRS)
@settings(deadline=None, max_examples=50)
def test_every_row_is_read_again_as_csv_reads_it(tmp_path_factory, separator, pairs):
    home = tmp_path_factory.mktemp("table")
    if separator == "\t":  # such tables have no quotes, so a cell has neither a tab nor a newline
        pairs = [tuple(cell.replace("\t", " ").replace("\n", " ") or "x" for cell in pair) for pair in pairs]
    pairs = [(text if text.strip() else "x", f"{number}.png") for number, (text, _) in enumerate(pairs)]
    for _, name in pairs:
        (home / name).touch()
    with (home / "a.csv").open("w", newline="", encoding="utf-8") as file:
        if separator == ",":
            csv.writer(file).writerows([("title", "filepath"), *pairs])
        else:
            file.writelines("\t".join(pair) + "\n" for pair in [("title", "filepath"), *pairs])
    source = csv_format.read(SourceSpec(format="csv", annotations=home / "a.csv", separator=separator))
    order = reversed(range(len(source)))
    assert [(*source.captions(i), i) for i in order] == [(text, i) for i, (text, _) in reversed([*enumerate(pairs)])]


def test_of_a_row_eight_bytes_are_in_memory(tmp_path, images):
    table = written(tmp_path / "a.csv", "title\tfilepath\n" + f"{'long ' * 100}\tred.png\n" * 1000)
    source = open_source(SourceSpec(format="csv", annotations=table, images=images))
    assert source.places.itemsize * len(source.places) == 8000 and len(source) == 1
    assert not any((source.paths.bytes, source.texts.bytes, source.groups, source.ends[1:]))


def test_a_table_that_was_changed_while_it_was_open_is_reported(tmp_path, images):
    table = written(tmp_path / "a.csv", "title\tfilepath\nred\tred.png\nblue\tblue.png\n")
    source = open_source(SourceSpec(format="csv", annotations=table, images=images))
    table.write_text("title\tfilepath\na longer line\tred.png\n")
    with pytest.raises(DataError, match=r"a\.csv has changed since it was opened"):
        source.captions(1)
