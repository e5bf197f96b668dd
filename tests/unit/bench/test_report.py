"""The table and the page show the figures of results.json."""

import copy
import html
import json
import re
import subprocess
from html.parser import HTMLParser

import pytest

from clipress.bench import report
from clipress.bench.report_page import pareto
from clipress.bench.results import Results, read_results, write_results
from clipress.errors import ArtifactError
from clipress.studies.browser import CHROMIUM
from clipress.tasks import TASKS

HOSTILE = '</script><script>alert(1)</script><!--<b id="in\'">&amp;'


def table(results):
    return report.table(Results.model_validate(results))


def comparison(results):
    return report.comparison(Results.model_validate(results))


def report_page(results):
    return report.report_page(Results.model_validate(results))


def timing(tower, batch, median):
    names = {"min_ms": 0.5, "max_ms": 4, "mean_ms": 1.1, "median_ms": 1, "p90_ms": 1.5, "p95_ms": 2, "p99_ms": 3}
    times = {name: factor * median for name, factor in names.items()} | {"p50_ms": median}
    rates = {"throughput_qps": 1000 / median, "items_per_s": 1000 * batch / median}
    return {"tower": tower, "batch": batch, "threads": 1, "iterations": 50} | rates | times


def row(stage, precision, params, size, top1, text_r1, image_r1, medians):
    """Return latencies; `medians` are those of the image tower at batch 1 and 32, and the text tower takes half."""
    return {
        "stage": stage,
        "artifact": stage,
        "backend": "onnxruntime",
        "precision": precision,
        "params": params,
        "params_without_embeddings": params // 2,
        "block_params": params // 4,
        "block_params_kept": params / 8_000_000,
        "macs": params * 3,
        "bytes": size,
        "accuracy": {"digits/top1": top1, "digits/top5": 100.0, "scenes/text_r1": text_r1, "scenes/image_r1": image_r1},
        "accuracy_se": {"digits/top1": 0.5, "scenes/text_r1": 1.4},
        "latency": [
            timing(tower, batch, median * share)
            for tower, share in (("text", 0.5), ("image", 1))
            for batch, median in zip((1, 32), medians, strict=True)
        ],
        "lineage": [
            {"stage": "start", "hash": "0" * 16},
            {"stage": stage, "kind": "distill", "settings": {"steps": 7, "keep": None}, "seed": 0, "hash": stage * 2},
        ],
    }


FIGURES = {
    "segmentation": ({"shapes/miou": 53.4, "shapes/pixel_accuracy": 91.0}, "mIoU"),
    "caption": ({"scenes/cider": 326.6, "scenes/bleu4": 63.1}, "CIDEr"),
    "vqa": ({"questions/accuracy": 58.3}, "accuracy"),
    "nlvr": ({"statements/accuracy": 71.2}, "accuracy"),
    "retrieval": ({"scenes/text_r1": 70.0, "scenes/image_r1": 60.0, "scenes/r_mean": 80.0}, "mean"),
    "classification": ({"digits/top1": 99.0, "digits/top5": 100.0}, "top-1"),
    "clip": ({"digits/top1": 99.0, "digits/top5": 100.0}, "top-1"),
}


def test_every_task_has_figures_here():
    assert FIGURES.keys() == TASKS.keys()


@pytest.mark.parametrize("task", FIGURES)
def test_the_table_and_the_page_show_the_figure_that_decides_for_a_task(task, results):
    accuracy, head = FIGURES[task]
    for one in results["rows"]:
        one |= {"task": task, "accuracy": accuracy, "accuracy_se": {}}
    lines = table(results).splitlines()
    assert head in lines[1].split() and f"{next(iter(accuracy.values())):.1f}" in lines[2].split()
    assert head in report_page(results)


@pytest.fixture
def results():
    """Four rows with mean accuracies 90, 84, 88.5 and 89. The front at image batch 32 is int8, sparse, teacher."""
    return {
        "schema_version": 1,
        "conditions": {
            "recipe": "tiny",
            "date": "2025-03-04T05:06:07+00:00",
            "clipress": "9.8.7",
            "onnxruntime": "1.2.3",
            "processor": "Some CPU",
            "cores": 4,
            "isa": ["avx2"],
            "threads": 1,
            "warm_up_ms": 200,
            "interleaved": True,
            "data": {"digits": {"items": 360}},
        },
        "rows": [
            row("teacher", "fp32", 8_000_000, 32_000_000, 98.0, 84.0, 80.0, (1.0, 10.0)),
            row("pruned", "fp32", 4_000_000, 16_000_000, 92.0, 78.0, 74.0, (0.6, 6.0)),
            row("sparse", "fp32", 4_000_000, 16_000_000, 97.5, 82.0, 80.0, (0.6, 5.0)),
            row("int8", "int8", 4_000_000, 5_000_000, 97.0, 81.0, 79.0, (0.5, 4.0)),
        ],
    }


def test_the_table_and_the_page_say_in_one_line_what_could_not_be_read(results):
    assert "not be read" not in table(results) + report_page(results)
    results["conditions"]["data"]["digits"]["unread"] = 2
    for one in results["rows"]:
        one["lineage"][1]["details"] = {"bad_records": 3 if one["stage"] == "int8" else 0}
    line = "Records that could not be read: 2 in digits (left out), 3 in int8 (replaced)."
    assert line in table(results).splitlines() and report_page(results).count(line) == 1


def verdict(faster, text):
    judged = {"stage": "int8", "against": "sparse", "method": "INT8", "keep": None, "loss": None, "cases": []}
    return judged | {"faster": faster, "text": text}


def renamed(results, name):
    """Put a name everywhere that user input reaches the page."""
    results = copy.deepcopy(results)
    results["conditions"] |= {"recipe": name, "processor": name, name: name}
    last = results["rows"][-1]
    last |= {"stage": name, "precision": name, "backend": name}
    last["accuracy"][f"{name}/top1"] = 1.0
    last["latency"].append(timing(name, 2, 1.0))
    last["lineage"].append({"stage": name, "kind": name, "settings": {name: [name]}, "hash": name})
    last["layers"] = [{"tower": name, "name": name, "params": 1, "macs": 1}]
    spent = [{"name": name, "median_ms": 1.0, "percent": 100.0, "nodes": 1}]
    last["profiles"] = [{"tower": "image", "batch": 2, "queries": 1, "operators": spent, "layers": spent}]
    results["verdicts"] = [verdict(False, name)]
    return results


class Read(HTMLParser):
    """Parse the page without JavaScript: the texts of tables, by id, and of scripts."""

    def __init__(self, page):
        super().__init__()
        self.tables, self.scripts, self.ids, self.heading = {}, [], [], ""
        self._in, self._table, self._depth = "", None, 0
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        self._in = tag
        self.ids.append(known.get("id"))
        if tag == "table":
            self._table = self.tables.setdefault(known["id"], [])
        elif tag == "tr":
            self._table.append([])
        elif tag in ("th", "td"):
            self._table[-1].append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._table = None if tag == "table" else self._table

    def handle_data(self, data):
        if self._in == "script":
            self.scripts[-1] += data
        elif self._in in ("h1", "b") and not self.tables:
            self.heading += data
        elif self._table and self._table[-1]:
            self._table[-1][-1] += data.strip()


# ---- Pareto front


def test_the_pareto_front_matches_a_hand_drawn_example():
    points = [(1, 1), (2, 3), (3, 2), (4, 4), (5, 4), (4, 1)]
    assert pareto(points) == [0, 1, 3]


def test_equal_points_are_both_on_the_front_and_an_absent_point_is_not():
    assert pareto([(2, 5), None, (2, 5), (2, 4), (3, 5)]) == [0, 2]
    assert pareto([None]) == pareto([]) == []


def test_points_off_the_front_are_dominated_and_points_on_it_are_not():
    points = [((i * 37) % 20, (i * i * 13) % 20) for i in range(60)]
    front = pareto(points)

    def better(i, j):
        return points[i] != points[j] and points[i][0] <= points[j][0] and points[i][1] >= points[j][1]

    for j in range(len(points)):
        assert any(better(i, j) for i in front) == (j not in front)


# ---- terminal


def test_the_table_shows_hand_computed_figures(results):
    groups, heads, *lines = table(results).splitlines()
    assert heads.split() == (
        "stage precision all no emb. kept % (M) (MB) top-1 i->t t->i mean batch 1 batch 32 speed-up".split()
    )
    assert [word for word in re.split(r"[ -]{2,}", groups) if word] == [
        "params (M)", "blocks", "MACs", "size", "digits", "scenes R@1", "image (ms)",
    ]  # fmt: skip
    assert lines[0].split() == ("teacher fp32 8.00 4.00 100.0 24.0 32.00 98.0 84.0 80.0 82.0 1.000 10.00 1.00".split())
    assert lines[3].split() == "int8 int8 4.00 2.00 50.0 12.0 5.00 97.0 81.0 79.0 80.0 0.500 4.00 2.50".split()


def test_the_table_names_the_conditions_of_its_figures(results):
    beneath = table(results).partition("\n\n")[2]
    assert "Some CPU, 4 cores, avx2, 1 thread, onnxruntime 1.2.3, clipress 9.8.7, 2025-03-04 05:06:07 UTC." in beneath
    assert "speed-up: against teacher at batch 32" in beneath


def test_the_table_has_columns_for_the_measured_sets_and_batches(results):
    for given in results["rows"]:
        given["accuracy"] = {"pets/top1": 55.5}
        given["latency"] = [timing("image", 16, 3.0)]
    heads, first = table(results).splitlines()[1:3]
    assert heads.split()[-4:] == ["top-1", "batch", "16", "speed-up"]
    assert first.split()[-3:] == ["55.5", "3.00", "1.00"]
    assert "i->t" not in table(results)


def test_a_wide_table_fits_the_terminal_and_names_the_omitted_columns(results):
    for given in results["rows"]:
        given["stage"] += "-with-a-very-long-name-indeed"
        given["accuracy"] |= {f"set{i}/{kind}_r1": 50.0 for i in range(9) for kind in ("text", "image")}
    shown = table(results)
    assert max(map(len, shown.splitlines())) <= 118
    assert "set8 R@1 i->t" in shown.partition("Left out for width:")[2].replace("\n", " ")
    assert "speed-up" in shown


def test_a_missing_figure_is_a_dash(results):
    del results["rows"][1]["params_without_embeddings"], results["rows"][1]["accuracy"]["digits/top1"]
    results["rows"][1]["latency"] = []
    words = table(results).splitlines()[3].split()
    assert words == "pruned fp32 4.00 - 50.0 12.0 16.00 - 78.0 74.0 76.0 - - -".split()


# ---- page without JavaScript


def test_the_page_has_a_headline_with_the_gain(results):
    said = re.sub("<.*?>", "", re.search('<section id="headline">(.*?)</section>', report_page(results))[1])
    assert "int8 is 2.5 times faster and 6.4 times smaller than teacher, and loses 1.5 points of accuracy." in said
    assert "10.00 → 4.00 ms" in said and "32.00 → 5.00 MB" in said
    assert "90.0 → 88.5 %" in said


@pytest.mark.parametrize("task", ["caption", "segmentation"])
def test_the_headline_has_the_figures_unit_which_cider_has_none_of(task, results):
    accuracy, _ = FIGURES[task]
    value = next(iter(accuracy.values()))
    for sets in (
        accuracy,
        accuracy | {f"other-{key}": one for key, one in accuracy.items()},
    ):  # one set, and the mean of two
        for one in results["rows"]:
            one |= {"task": task, "accuracy": sets, "accuracy_se": {}}
        said = re.sub("<.*?>", "", re.search('<section id="headline">(.*?)</section>', report_page(results))[1])
        assert f"{value} → {value}" in said
        assert (f"{value} → {value} %" in said) is (task != "caption")


def test_the_headline_skips_models_that_lost_more_than_three_percent(results):
    results["rows"][3]["accuracy"]["digits/top1"] = 50.0
    assert "<b>sparse</b> is" in report_page(results)
    results["rows"] = results["rows"][:2]
    assert "No other model keeps 97% of the accuracy of <b>teacher</b> (overall mean)" in report_page(results)


def test_the_headline_does_not_call_a_slower_model_faster(results):
    results["rows"][3]["latency"][3]["median_ms"] = 15.0
    assert "1.5 times slower" in report_page(results)


def test_the_page_has_every_figure_without_javascript(results):
    read = Read(report_page(results))
    int8 = read.tables["main"][-1]
    assert int8[:2] == ["int8", "int8"]
    assert int8[7:12] == ["97.0", "81.0", "79.0", "80.0", "88.5"]
    assert int8[12:] == ["4.00", "2.50", "6.00", "8.00", "12.00", "8000"]  # 250 queries/s at batch 32.
    assert len(read.tables["latency"]) == 2 + 4 * 4
    assert [
        "int8",
        "text",
        "32",
        "1.000",
        "8.000",
        "2.200",
        "2.000",
        "3.000",
        "4.000",
        "6.000",
        "500",
        "16000",
        "50",
    ] in (read.tables["latency"])
    assert read.tables["accuracy"][2][1:4] == ["98.0 ± 0.5", "100.0", "84.0 ± 1.4"]


def test_the_page_marks_the_rows_on_the_front(results):
    marks = re.findall(r'<tr class="(\w+)" data-row="(\d)">', report_page(results))
    assert marks == [("front", "0"), ("behind", "1"), ("front", "2"), ("front", "3")]


def test_the_page_shows_each_stage_of_the_lineage_once_with_settings_and_hash(results):
    page = report_page(results)
    assert page.count("<code>0000000000000000</code>") == 1
    assert page.count("<li>steps <b>7</b></li>") == 4 and "<li>keep" not in page
    assert "<code>int8int8</code>" in page


def test_the_page_shows_the_conditions(results):
    page = report_page(results)
    for name, value in (("warm up (ms)", "200"), ("interleaved", "yes"), ("data", "digits items 360")):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page


def test_the_page_loads_no_external_resources(results):
    page = report_page(results)
    assert not re.search("https?://|@import|url\\(", page)
    assert not re.search(r"<(script|img|iframe|link)[^>]*\b(src|href)=\"(?!data:)", page)


def test_names_cannot_inject_html(results):
    expected = Read(report_page(renamed(results, "plain")))
    read = Read(report_page(renamed(results, HOSTILE)))
    assert len(read.scripts) == 2 and read.ids == expected.ids
    assert read.scripts[1] == expected.scripts[1]
    assert json.loads(read.scripts[0])["rows"][-1]["name"] == HOSTILE
    assert read.tables["main"][-1][0] == HOSTILE
    assert HOSTILE in read.heading


def test_names_that_look_like_placeholders_are_left_unchanged(results):
    page = report_page(renamed(results, "@@data@@"))
    assert Read(page).tables["main"][-1][0] == "@@data@@"


def test_optional_fields_may_be_absent(results):
    for given in results["rows"]:
        for name in ("accuracy_se", "lineage", "params_without_embeddings"):
            del given[name]
    results["conditions"] = {}
    assert "The results hold no lineage." in report_page(results)
    assert "84.0" in Read(report_page(results)).tables["accuracy"][2]


@pytest.mark.parametrize("absent", [{"latency": []}, {"accuracy": {}}, {"latency": [], "accuracy": {}}])
def test_results_without_latency_or_accuracy_still_make_a_table_and_a_page(results, absent):
    for given in results["rows"]:
        given.update(absent)
    assert "pruned" in table(results)
    assert Read(report_page(results)).tables["main"][-1][0] == "int8"


def test_one_row_makes_a_table_and_a_page(results):
    results["rows"] = results["rows"][:1]
    assert table(results).splitlines()[2].split()[-1] == "1.00"
    assert "nothing yet to compare" in report_page(results)


def test_the_report_is_written_into_the_folder(results, tmp_path):
    path = report.write_report(Results.model_validate(results), tmp_path / "bench")
    assert path == tmp_path / "bench" / "report.html"
    assert path.read_text(encoding="utf-8") == report_page(results)


# ---- results.json


def test_results_round_trip_and_unset_keys_are_not_written(results, tmp_path):
    path = write_results(Results.model_validate(paired(results)), tmp_path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(results))
    assert read_results(path) == Results.model_validate(results)


@pytest.mark.parametrize(
    "rename",
    [("rows", "stage"), ("rows", "bytes"), ("rows", "latency", "median_ms"), ("rows", "latency", "cv_percent")],
)
def test_a_renamed_key_is_a_validation_error(results, tmp_path, rename):
    *path, key = rename
    inner = paired(results)
    for name in path:
        inner = inner[name][0]
    inner[f"{key}_renamed"] = inner.pop(key)
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ArtifactError, match=rf"{key}.*Measure again: clipress bench RUN"):
        read_results(tmp_path / "results.json")


def test_missing_results_name_the_command_that_writes_them(tmp_path):
    with pytest.raises(ArtifactError, match=r"no such file.*clipress bench RUN"):
        read_results(tmp_path / "results.json")


# ---- interleaved measurements


def paired(results):
    """Results of an interleaved measurement: speed-ups with intervals, verdicts, costs per layer and a profile."""
    layers = [
        {"tower": "image", "name": "visual.blocks.0", "params": 4_000, "macs": 2_500_000},
        {"tower": "image", "name": "all else", "params": 1_000, "macs": 1_234_567},
        {"tower": "text", "name": "blocks.0", "params": 3_000, "macs": 500_000},
    ]
    for given, ratio in zip(results["rows"], (1.0, 1.7, 2.1, 2.6), strict=True):
        for one in given["latency"]:
            ends = {"speed_up_low": ratio * 0.98, "speed_up_high": ratio * 1.02}
            one |= {"speed_up": ratio, **ends, "rounds": 20, "cv_percent": 2.0, "p50_ms": one["median_ms"]}
        given["layers"] = copy.deepcopy(layers)
    results["rows"][0]["layers"][0] |= {"params": 8_000, "macs": 5_000_000}
    spent = [
        {"name": name, "median_ms": ms, "percent": 20 * ms, "nodes": 6} for name, ms in (("MatMul", 4.0), ("Add", 1.0))
    ]
    results["rows"][3]["profiles"] = [
        {
            "tower": "image",
            "batch": 32,
            "queries": 20,
            "operators": spent,
            "layers": [spent[0] | {"name": "visual.blocks.0"}],
        }
    ]
    results["verdicts"] = [
        verdict(False, "2:4, no difference seen here: sparse is 1.00 [0.99, 1.01] times as fast. Keep pruned."),
        verdict(True, "INT8 is faster here: Keep int8."),
        verdict(None, "INT8, no difference seen here."),
    ]
    return results


def test_the_table_shows_paired_ratios_with_their_uncertainty(results):
    shown = table(paired(results))
    assert shown.splitlines()[5].split()[-1] == "2.60"  # The ratio of medians is 2.50.
    beneath = " ".join(shown.partition("\n\n")[2].split())
    assert "speed-up: against teacher at batch 32, paired by rounds, 95 % intervals of ± 2.0% or less." in beneath
    assert "2:4, no difference seen here: sparse is 1.00 [0.99, 1.01] times as fast. Keep pruned." in beneath
    assert "Unstable" not in beneath


def test_the_table_has_the_warnings_of_trtexec(results):
    rows = paired(results)["rows"]
    rows[1]["latency"][0]["cv_percent"] = 41.4
    rows[2]["latency"][3] |= {"enqueue_median_ms": 4.5}
    shown = " ".join(table(results).split())
    assert "above 2.5 % in 1 of 16 measurements, up to 41 %" in shown
    assert "Bound by enqueue time in 1 of 16 measurements" in shown


def test_a_comparison_shows_every_tower_and_batch_of_every_row(results):
    lines = comparison(paired(results)).splitlines()
    assert len([line for line in lines if line.startswith(("image", "text"))]) == 16
    (line,) = [line for line in lines if line.split()[:3] == ["image", "32", "int8"]]
    assert line.split()[3:] == ["4.000", "12.000", "2.0", "2.600", "2.548-2.652"]
    assert lines[-1] == (
        "speed-up: against teacher, 20 rounds or more; above 1 is faster; no difference seen where the interval includes 1."
    )


def test_the_page_shows_speed_ups_with_intervals(results):
    int8 = Read(report_page(paired(results))).tables["main"][-1]
    assert int8[12:15] == ["4.00", "2.60", "2.55–2.65"]


def test_the_headline_has_the_same_speed_up_as_the_table(results):
    page = report_page(paired(results))
    assert "2.6 times faster" in page and "2.5 times faster" not in page  # The ratio of medians is 2.5.


def test_the_page_shows_the_verdicts(results):
    page = report_page(paired(results))
    kinds = re.findall(r'<li class="(\w+)">([^\s,]+)', page.partition('id="verdicts"')[2].partition("</ul>")[0])
    assert kinds == [("no", "2:4"), ("yes", "INT8"), ("unsure", "INT8")]


def test_layers_are_grouped_by_shape_with_exact_values_in_tooltips(results):
    page = report_page(paired(results))
    found = Read(page).tables["layers"]
    assert found[1] == ["layer", "tower", *["teacher", "pruned, sparse, int8"] * 2]
    assert found[2] == ["visual.blocks.0", "image", "8.00", "4.00", "5.00", "2.50"]
    assert 'title="1,234,567 MACs"' in page and 'style="--part: 0.5000"' in page
    assert "no costs per layer" in report_page(renamed_without_layers(results))


def renamed_without_layers(results):
    results = copy.deepcopy(results)
    for given in results["rows"]:
        del given["layers"]
    return results


def test_a_profile_is_shown_by_operator_and_by_layer(results):
    assert "clipress bench RUN --profile" in report_page(results)
    tables = Read(report_page(paired(results))).tables
    assert tables["profile-3-image-operators"][2:] == [["MatMul", "4.000", "80.0", "6"], ["Add", "1.000", "20.0", "6"]]
    assert tables["profile-3-image-layers"][2][0] == "visual.blocks.0"


def test_without_accuracy_the_headline_names_the_fastest(results):
    for given in paired(results)["rows"]:
        given["accuracy"] = given["accuracy_se"] = {}
    said = re.sub("<.*?>", "", re.search('<section id="headline">(.*?)</section>', report_page(results))[1])
    assert said.startswith("int8 is 2.60 times as fast as teacher (95 %: 2.55 to 2.65), image tower, batch 32.")


@pytest.mark.parametrize("has_accuracy", [True, False])
def test_the_headline_names_no_faster_model_where_the_interval_includes_1(results, has_accuracy):
    for given in paired(results)["rows"]:
        for one in given["latency"]:
            one |= {"speed_up": 1.3 if given["stage"] == "int8" else 1.0, "speed_up_low": 0.9, "speed_up_high": 1.6}
        if not has_accuracy:
            given["accuracy"] = given["accuracy_se"] = {}
    said = re.sub("<.*?>", "", re.search('<section id="headline">(.*?)</section>', report_page(results))[1])
    expected = (
        "int8 is no faster or slower and 6.4 times smaller than teacher"
        if has_accuracy
        else (
            "No difference seen between int8 and teacher (1.30 times as fast, 95 %: 0.90 to 1.60), image tower, batch 32."
        )
    )
    assert said.startswith(expected)


# ---- page in a browser


def visit(page, script, folder):
    """Open a copy of the page with a script appended; return the script's result and the console output."""
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    probe = f"""<script>(() => {{
      const all = (selector) => [...document.querySelectorAll(selector)], one = (selector) => document.querySelector(selector);
      const choose = (id, text) => {{
        const menu = one("#" + id);
        menu.value = [...menu.options].find((option) => option.text === text).value;
        menu.dispatchEvent(new Event("change"));
      }};
      const stages = () => all("#main tbody th").map((head) => head.textContent);
      const cells = (name) => [...all("#main tbody tr").find((row) => row.cells[0].textContent === name).cells];
      const sort = (text) => all("#main thead button").find((button) => button.textContent === text).click();
      const point = (i) => one(`.point[data-row="${{i}}"]`);
      const front = () => all(".point.front").map((found) => Number(found.dataset.row)).sort();
      const answer = (() => {{ {script} }})();
      const written = document.createElement("pre");
      written.id = "answer";
      written.textContent = JSON.stringify(answer);
      document.body.append(written);
    }})();</script>"""
    path = folder / "page.html"
    path.write_text(page.replace("</body>", probe + "</body>"), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --virtual-time-budget=3000 --enable-logging=stderr --v=0"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={folder / 'profile'}", "--dump-dom", path.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in ran.stderr.splitlines() if ":CONSOLE" in line]
    written = re.search('<pre id="answer">(.*?)</pre>', ran.stdout, re.DOTALL)
    return json.loads(html.unescape(written[1])) if written else None, console


def test_clicking_a_header_sorts_ascending_then_descending_then_resets(results, tmp_path):
    answer, console = visit(
        report_page(results),
        """
        const found = [];
        for (let i = 0; i < 3; i++) { sort("p90"); found.push([stages(), all("[aria-sort]").map((h) => h.ariaSort)]); }
        sort("stage");
        found.push([stages(), all("[aria-sort]").map((h) => h.textContent)]);
        return found;
        """,
        tmp_path,
    )
    assert console == []
    assert answer == [
        [["int8", "sparse", "pruned", "teacher"], ["ascending"]],
        [["teacher", "pruned", "sparse", "int8"], ["descending"]],
        [["teacher", "pruned", "sparse", "int8"], []],
        [["int8", "pruned", "sparse", "teacher"], ["stage"]],
    ]


def test_numbers_sort_numerically_and_missing_ones_come_last(results, tmp_path):
    results["rows"][0]["accuracy"]["digits/top1"] = 100.0
    del results["rows"][2]["accuracy"]["digits/top1"]
    answer, console = visit(
        report_page(results), 'sort("top-1"); const up = stages(); sort("top-1"); return [up, stages()];', tmp_path
    )
    assert console == []
    assert answer == [["pruned", "int8", "teacher", "sparse"], ["teacher", "int8", "pruned", "sparse"]]


def test_a_point_shows_its_figures_on_hover_and_focus(results, tmp_path):
    answer, console = visit(
        report_page(results),
        """
        const tip = one("#tip"), before = tip.hidden;
        point(3).dispatchEvent(new PointerEvent("pointerenter"));
        const terms = [...tip.querySelectorAll("dd")].map((value) => [value.previousElementSibling.textContent, value.textContent]);
        const said = tip.textContent, shown = tip.getBoundingClientRect().height > 0;
        point(3).dispatchEvent(new PointerEvent("pointerleave"));
        const after = tip.hidden;
        point(1).dispatchEvent(new FocusEvent("focus"));
        return {before, shown, said, after, terms, second: tip.hidden ? "" : tip.textContent, stop: point(1).tabIndex};
        """,
        tmp_path,
    )
    assert console == []
    assert (answer["before"], answer["shown"], answer["after"], answer["stop"]) == (True, True, True, 0)
    assert answer["said"].startswith("int8on the Pareto front")
    assert answer["second"].startswith("prunedanother model is at least as fast")
    expected = {"overall mean (%)": "88.5", "median": "4.00", "speed-up": "2.50", "p90": "6.00", "p95": "8.00"}
    expected |= {"p99": "12.00", "items/s": "8000", "size (MB)": "5.00", "digits top-1": "97.0", "MACs (M)": "12.0"}
    assert expected.items() <= dict(answer["terms"]).items()


def test_chart_and_table_follow_the_selection(results, tmp_path):
    results["rows"][2]["latency"][0] |= timing("text", 1, 0.1)  # Text at batch 1: sparse is fastest.
    results["rows"][2]["accuracy"]["digits/top1"] = 98.5  # It is also the most accurate on digits.
    answer, console = visit(
        report_page(results),
        """
        const figures = () => [front(), cells("sparse").slice(-6).map((cell) => cell.textContent),
                               all("#main tr.front th").map((head) => head.textContent), one("svg").textContent];
        sort("median");
        const found = [figures(), stages()];
        choose("tower", "text"); choose("batch", "1"); choose("metric", "digits top-1");
        return [...found, figures(), stages()];
        """,
        tmp_path,
    )
    assert console == []
    first, order, second, order_after = answer
    assert first[0] == [0, 2, 3] and first[1][0] == "5.00" and order[0] == "int8"
    assert "overall mean (%)" in first[3] and "image tower, batch 32 (ms)" in first[3]
    assert second[0] == [2] and second[1] == ["0.100", "5.00", "0.150", "0.200", "0.300", "10000"]
    assert second[2] == ["sparse"] and order_after[0] == "sparse"
    assert "digits top-1 (%)" in second[3] and "text tower, batch 1 (ms)" in second[3]


def test_bubble_areas_follow_file_sizes_and_labels_do_not_overlap(results, tmp_path):
    results["rows"] += [copy.deepcopy(results["rows"][2]) | {"stage": f"sparse-{i}"} for i in range(5)]
    answer, console = visit(
        report_page(results),
        """
        return {
          radii: [0, 1].map((i) => point(i).querySelector(".area").r.baseVal.value),
          labels: all("svg .label").map((label) => { const b = label.getBBox(); return [b.x, b.y, b.width, b.height]; }),
          room: one("svg").clientWidth,
        };
        """,
        tmp_path,
    )
    assert console == []
    assert answer["radii"][0] ** 2 == pytest.approx(2 * answer["radii"][1] ** 2)
    labels = answer["labels"]
    assert len(labels) == 9
    for i, (x, y, width, height) in enumerate(labels):
        assert x >= 0 and x + width <= answer["room"]
        for u, v, w, h in labels[:i]:
            assert x >= u + w or u >= x + width or y >= v + h or v >= y + height


def test_names_do_not_run_as_code_in_a_browser(results, tmp_path):
    hostile = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"
    answer, console = visit(
        report_page(renamed(results, hostile)),
        """
        all("thead button").forEach((button) => button.click());
        for (const menu of all("select")) for (const option of [...menu.options]) choose(menu.id, option.text);
        all(".point").forEach((found) => found.dispatchEvent(new PointerEvent("pointerenter")));
        return [window.broken ?? null, all("img").length, all("script:not([type])").length];
        """,
        tmp_path,
    )
    assert console == []
    assert answer == [None, 0, 2]  # The page has its own script and the probe.


def test_a_full_page_shows_tooltips_sorts_its_layers_and_logs_no_error(results, tmp_path):
    answer, console = visit(
        report_page(paired(results)),
        """
        point(3).dispatchEvent(new PointerEvent("pointerenter"));
        const terms = [...one("#tip").querySelectorAll("dd")].map((dd) => [dd.previousElementSibling.textContent, dd.textContent]);
        const layers = () => all("#layers tbody th").map((head) => head.textContent);
        const heads = all("#layers thead button");
        heads.at(-1).click();
        const up = layers();
        heads.at(-1).click();
        const bar = one("#layers tbody td[style]");
        const grey = getComputedStyle(point(1).querySelector(".area")).stroke;
        const own = getComputedStyle(point(3).querySelector(".area")).stroke;
        choose("batch", "1");
        const cell = cells("int8").map((found) => found.textContent);
        return {terms, up, down: layers(), title: bar.title, drawn: getComputedStyle(bar).backgroundImage, grey, own, cell,
                verdicts: all("#verdicts li").length};
        """,
        tmp_path,
    )
    assert console == []
    assert {"speed-up": "2.60", "95 %": "2.55–2.65", "median": "4.00"}.items() <= dict(answer["terms"]).items()
    assert answer["up"] == ["blocks.0", "all else", "visual.blocks.0"] and answer["down"] == answer["up"][::-1]
    assert answer["title"].endswith("parameters") and "linear-gradient" in answer["drawn"]
    assert answer["grey"] != answer["own"]  # Dominated models are grey.
    assert "0.500" in answer["cell"] and answer["verdicts"] == 3
