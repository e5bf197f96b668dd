"""A tiny recipe runs through every stage to a Triton repository."""

import json
import re
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import DATA, SHORT, clipress, write_recipe
from onnx import numpy_helper
from PIL import Image

from clipress.artifact import load_artifact, read_header, save_artifact
from clipress.compress.sparsify import is_two_of_four
from clipress.data import digits
from clipress.models import anatomy, surgery
from clipress.models.load import artifact_from_model, new_model
from clipress.models.tiny import tiny_architecture
from clipress.tasks import model_from_artifact
from clipress.tasks.clip import encoders

STAGES = ["teacher", "pruned", "recovered", "sparse", "int8"]


def test_every_stage_has_an_artifact_a_row_and_a_repository(tiny_run):
    run, result = tiny_run
    assert result.exit_code == 0, result.output
    results = json.loads((run / "bench" / "results.json").read_text())
    assert [row["stage"] for row in results["rows"]] == STAGES
    for row in results["rows"]:
        assert (run / row["stage"] / "model.safetensors").is_file()
        assert {"digits/top1", "digits/top5", "scenes/text_r1", "scenes/image_r10"} <= row["accuracy"].keys()
        assert [(case["tower"], case["batch"], case["ids"]) for case in row["latency"]] == [
            *(("image", 1, 0), ("image", 2, 0)),
            *(("text", 1, 0), ("text", 1, 16), ("text", 2, 0), ("text", 2, 16)),
        ]
        towers = [run / "export" / row["stage"] / f"{tower}.onnx" for tower in ("image", "text")]
        assert row["bytes"] == sum(file.stat().st_size for file in towers)
    page = (run / "bench" / "report.html").read_text()
    table = page.partition('<table id="main">')[2].partition("</table>")[0]
    assert re.findall(r'scope="row"[^>]*>([^<]+)</th>', table) == STAGES
    backends = sorted(path for path in (run / "triton").iterdir() if path.is_dir())
    assert [path.name for path in backends] == ["onnxruntime", "python"]
    for backend in backends:
        models = {version.parent for version in backend.glob("*/[0-9]*")}
        assert {f"{tower}_encoder" for tower in ("image", "text")} <= {model.name for model in models}
        assert models == {config.parent for config in backend.glob("*/config.pbtxt")}
    for stage in STAGES:
        assert stage in result.output


def test_pruning_meets_its_budget_and_the_lineage_lists_every_stage(tiny_run):
    run, _ = tiny_run
    teacher, int8 = read_header(run / "teacher"), read_header(run / "int8")
    kept = int8["counts"]["block_params"] / teacher["counts"]["block_params"]
    assert 0.4 < kept <= 0.5
    assert [r["kind"] for r in int8["lineage"] if "kind" in r] == [
        "distill",
        "prune",
        "distill",
        "sparsify",
        "quantize",
    ]
    for earlier, later in zip(int8["lineage"], int8["lineage"][1:], strict=False):
        assert later["parent"] == earlier["hash"]


@pytest.mark.parametrize("stage", ["sparse", "int8"])
def test_two_of_four_survives_training_saving_and_int8(tiny_run, stage):
    run, _ = tiny_run
    artifact = load_artifact(run / stage)
    names, skipped = artifact.sparsity["weights"], artifact.sparsity["skipped"]
    in_blocks = [name for name in skipped if "resblocks" in name]
    assert len(names) + len(in_blocks) == 24  # Four blocks with six Linears each.
    assert len(names) >= 20 and all("2:4 requires" in skipped[name] for name in in_blocks)
    for name in names:
        assert is_two_of_four(artifact.weights[name]), name
    model = onnx.load(run / "export" / stage / "image.onnx")
    matrices = [numpy_helper.to_array(i) for i in model.graph.initializer if len(i.dims) == 2]
    sparse = [
        m
        for m in matrices
        if is_two_of_four(torch.from_numpy(m.T.astype("f"))) or is_two_of_four(torch.from_numpy(m.astype("f")))
    ]
    assert len(sparse) >= 10


def test_int8_runs_on_integer_kernels(tiny_run, tmp_path):
    run, _ = tiny_run
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(run / "export" / "int8" / "image.onnx"), options, ["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    integer = sum(kind in ("MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "DynamicQuantizeMatMul") for kind in kinds)
    quantized = [name for name in read_header(run / "int8")["quantization"]["modules"] if name.startswith("visual.")]
    linears = [name for name in quantized if ".resblocks." in name]
    assert len(linears) == 2 * 6 and "visual.conv1" in quantized  # q, k, v, out and two in the feed-forward.
    assert integer == len(quantized)


@pytest.mark.parametrize("stage", STAGES)
def test_an_artifact_is_read_back_with_bitwise_equal_outputs(tiny_run, stage, tmp_path):
    from clipress.artifact import save_artifact
    from clipress.models.load import artifact_from_model

    run, _ = tiny_run
    first = model_from_artifact(run / stage)
    save_artifact(artifact_from_model(first, (), {}), tmp_path / "again")
    second = model_from_artifact(tmp_path / "again")
    pixels = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype("f")
    ids = first.tokenize()(["a red circle", "two"])
    for inputs, a, b in zip((pixels, ids), encoders(first, "Test"), encoders(second, "Test"), strict=True):
        np.testing.assert_array_equal(a(inputs), b(inputs))


def test_predict_classifies_an_image_with_onnx_runtime(tiny_run, tmp_path):
    run, _ = tiny_run
    Image.fromarray(digits.digits("test")[0][0]).save(tmp_path / "digit.png")
    result = clipress("predict", run, tmp_path / "digit.png", "--labels", "zero,one,two")
    assert result.exit_code == 0, result.output
    shares = [float(part.split()[-1].rstrip("%")) for part in result.stdout.split(": ", 1)[1].split("  ")]
    assert len(shares) == 3 and sum(shares) == pytest.approx(100, abs=0.2)


def test_a_second_run_reuses_every_stage_and_a_changed_one_is_rerun(tiny_run, recipe, tmp_path):
    run, _ = tiny_run
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    again = clipress("compress", write_recipe(recipe, tmp_path), "--out", copy)
    assert again.output.count(": reused,") == 5, again.output
    recipe["stages"][3]["quantize"]["steps"] = 1
    (copy / "recipe.yaml").unlink()
    from clipress.recipe import Recipe, recipe_text
    from clipress.storage import write_text_whole

    write_text_whole(copy / "recipe.yaml", recipe_text(Recipe(**recipe)))
    changed = clipress("compress", write_recipe(recipe, tmp_path), "--out", copy)
    assert changed.exit_code == 0, changed.output
    assert changed.output.count(": reused,") == 4 and "int8: quantize" in changed.output
    assert read_header(copy / "sparse") == read_header(run / "sparse")


def test_settings_are_printed_with_their_defaults(tiny_run):
    _, result = tiny_run
    line = next(line for line in result.output.splitlines() if line.startswith("pruned: prune"))
    for shown in ("criterion=fisher", "schedule=cubic", "weight_decay=0.05", "steps=6"):
        assert shown in line


def test_layers_that_stay_dense_are_reported_with_the_reason(tiny_run):
    run, result = tiny_run
    reason = "visual.conv1 stays dense: 32 x 3; 2:4 requires a multiple of 8 x a multiple of 16"
    assert f"sparse: {reason}" in result.output and reason in clipress("show", run / "sparse").output


def test_only_the_stages_of_the_recipe_run(recipe, tmp_path):
    recipe["stages"] = recipe["stages"][:1]
    result = clipress("compress", write_recipe(recipe, tmp_path), "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"teacher", "pruned", "recipe.yaml", "logs", ".lock"}


def test_the_upop_criterion_keeps_the_same_dims_in_every_head(recipe, tmp_path):
    recipe["stages"] = [
        {"prune": {**recipe["stages"][0]["prune"], "criterion": "upop", "schedule": "sine", "distill_losses": []}}
    ]
    result = clipress("compress", write_recipe(recipe, tmp_path), "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    shapes = read_header(tmp_path / "run" / "pruned")["shapes"].values()
    assert all(shape["qk_dim"] == shape["v_dim"] for shape in shapes)
    assert len({shape["ffn"] for shape in shapes} | {shape["qk_dim"] for shape in shapes}) > 1


def test_a_measured_cost_table_is_used_in_a_search(tiny_run, recipe, tmp_path):
    run, _ = tiny_run
    made = clipress("latency-table", run, "--out", tmp_path / "costs.json", "--duration", 1, "--batch", 2)
    assert made.exit_code == 0, made.output
    table = json.loads((tmp_path / "costs.json").read_text())
    assert table["towers"].keys() == {"image", "text"}
    for kinds in table["towers"].values():
        assert kinds["ffn"]["levels"][-1] == 128 and kinds["qk"]["levels"][-1] == 16
        assert all(len(points["ms"]) == len(points["levels"]) and min(points["ms"]) >= 0 for points in kinds.values())
    budget = {"latency": 0.8, "costs": str(tmp_path / "costs.json")}
    recipe["stages"] = [{"prune": {**recipe["stages"][0]["prune"], "budget": budget}}]
    pruned = clipress("compress", write_recipe(recipe, tmp_path), "--out", tmp_path / "run")
    assert pruned.exit_code == 0, pruned.output
    counts = [read_header(tmp_path / "run" / stage)["counts"]["block_params"] for stage in ("teacher", "pruned")]
    assert counts[1] < counts[0]


def test_an_imported_checkpoint_can_be_a_teacher(recipe, tmp_path):
    import open_clip

    from clipress.models.tiny import tiny_architecture

    torch.manual_seed(0)
    stock = open_clip.model.CLIP(**tiny_architecture(width=64, head_width=64, layers=1))
    torch.save({"state_dict": stock.state_dict()}, tmp_path / "epoch_1.pt")
    made = clipress("import", tmp_path / "epoch_1.pt", tmp_path / "teacher", "--format", "clip-kd")
    assert made.exit_code == 0, made.output
    recipe |= {"teacher": {"artifact": str(tmp_path / "teacher")}, "stages": recipe["stages"][:1]}
    assert clipress("compress", write_recipe(recipe, tmp_path), "--out", tmp_path / "run").exit_code == 0
    assert [record["stage"] for record in read_header(tmp_path / "run" / "pruned")["lineage"]] == ["import", "pruned"]


def test_a_changed_teacher_changes_the_hash_of_a_student_trained_from_scratch(recipe, tmp_path):
    from clipress.models.tiny import tiny_architecture

    recipe |= {
        "student": tiny_architecture(layers=1),
        "stages": [{"distill": {"losses": ["affinity"], "steps": 2, "batch_size": 8}}],
    }
    hashes = []
    for seed in (0, 1):
        recipe["teacher"]["recipe"]["seed"] = seed
        out = tmp_path / f"run-{seed}"
        assert clipress("compress", write_recipe(recipe, tmp_path), "--out", out).exit_code == 0
        hashes.append(read_header(out / "distilled")["lineage"][-1]["hash"])
    assert hashes[0] != hashes[1]


def test_several_teachers_are_embedded_once_and_read_from_the_cache(tiny_run, tmp_path):
    folder, _ = tiny_run
    # An ensemble of two teachers, neither of which runs during training.
    teachers = [{"artifact": str(folder / name), "cache": {"views": 2}} for name in ("teacher", "pruned")]
    recipe = {
        "name": "cached",
        "teacher": teachers,
        "data": DATA,
        "stages": [{"distill": {"losses": ["contrastive", "feature", "ensemble"], **SHORT, "steps": 3}}],
    }
    result = clipress("compress", write_recipe(recipe, tmp_path), "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert result.output.count(": embedding 96 of 96") == 4  # Two sources times two teachers.
    log = [json.loads(line) for line in (tmp_path / "run" / "logs" / "distilled.jsonl").read_text().splitlines()]
    assert len(log) == 3 and all(row["ensemble"] > 0 and row["feature"] >= 0 for row in log)
    again = clipress("compress", tmp_path / "recipe-under-test.yaml", "--out", tmp_path / "other", "--set", "seed=1")
    assert again.exit_code == 0 and again.output.count("using the cached embeddings of teacher") == 4


def test_caching_only_some_teachers_is_refused(tiny_run, tmp_path):
    folder, _ = tiny_run
    teachers = [{"artifact": str(folder / "teacher"), "cache": {}}, {"artifact": str(folder / "pruned")}]
    recipe = {"name": "mixed", "teacher": teachers, "data": DATA, "stages": [{"distill": {"steps": 1}}]}
    result = clipress("compress", write_recipe(recipe, tmp_path), "--out", tmp_path / "run")
    assert result.exit_code == 2 and "expected a 'cache' for every teacher or for none" in result.output


def test_serve_follows_the_recommendation_of_bench_unless_a_stage_is_named(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    path = run / "bench" / "results.json"
    results = json.loads(path.read_text())
    (measured,) = results["kept"]
    assert (measured["backend"], measured["of"]) == ("onnxruntime", "int8") and measured["artifact"] in STAGES
    assert measured["text"] in " ".join(tiny_run[1].output.split())
    for keeps, options, served, message in (
        (
            "sparse",
            (),
            "sparse",
            f"Serving sparse instead of int8, as {path} recommends. Override: --stage int8",
        ),
        ("sparse", ("--stage", "int8"), "int8", ""),
        ("int8", (), "int8", ""),
    ):
        kept = measured | {"artifact": keeps, "hash": read_header(run / keeps)["lineage"][-1]["hash"]}
        path.write_text(json.dumps(results | {"kept": [kept]}))
        result = clipress("serve", run, *options)
        assert result.exit_code == 0, result.output
        assert message in result.output and ("Serving " in result.output) == bool(message)
        assert f"Triton model repository of {served}, version" in result.output
        assert f"stage {served} (" in (run / "triton" / "onnxruntime" / "README.md").read_text()
    path.unlink()
    # Without measurements the last artifact is served.
    assert "Triton model repository of int8, version" in clipress("serve", run).output


def test_serving_another_stage_adds_a_version_that_can_be_rolled_back(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run[0], run)
    shutil.rmtree(run / "triton")
    outputs = [
        clipress("serve", run, "--backend", "python", *options).output
        for options in (["--stage", "recovered"], ["--stage", "int8"], ["--roll-back"], ["--version", "2"])
    ]
    assert "of recovered, version 1" in outputs[0] and "of int8, version 2" in outputs[1]
    assert "Version 1 is served" in outputs[2] and "Version 2 is served" in outputs[3]
    assert sorted(path.name for path in (run / "triton" / "python" / "classify").iterdir()) == [
        "1",
        "2",
        "config.pbtxt",
    ]
    kept = clipress("serve", run, "--backend", "python", "--stage", "int8", "--keep", "1").output
    assert f"Removed version 1 from {run}/triton/python" in kept
    assert not (run / "triton" / "python" / "classify" / "1").exists()


def test_a_model_with_parts_that_were_cut_whole_goes_through_every_stage(recipe, tmp_path):
    model = new_model(tiny_architecture(), 0)
    for part in anatomy.parts(model.module)[1:7:2]:  # feed-forwards
        surgery.cut(part, surgery.FfnMask(torch.zeros(part.hidden, dtype=torch.bool)))
    for part in anatomy.attentions(model.module)[1:]:
        none = torch.zeros(part.module.heads, part.module.qk_dim, dtype=torch.bool)
        surgery.cut(part, surgery.AttnMask(none, none))
    record = {"stage": "cut", "kind": "prune", "hash": "of a test"}
    save_artifact(artifact_from_model(model, (record,), {}), tmp_path / "cut")
    recipe["teacher"] = {"artifact": str(tmp_path / "cut")}
    recipe["stages"] = [
        {"distill": {"losses": ["contrastive"], **SHORT, "steps": 2}},
        {"sparsify": {"method": "sparsegpt", "calibrate": 32, **SHORT, "steps": 0}},
        {"quantize": {"calibrate": 32, **SHORT, "steps": 0}},
    ]
    result = clipress("run", write_recipe(recipe, tmp_path), "--out", tmp_path / "run")
    assert result.exit_code == 0, (result.output, result.exception)
    whole = [name for name, layer in model.module.named_modules() if getattr(layer, "weight", None) is not None]
    empty = {name for name in whole if not model.module.get_submodule(name).weight.numel()}
    int8 = load_artifact(tmp_path / "run" / "int8")
    assert empty and not empty & set(int8.quantization["modules"])
    assert not {f"{name}.weight" for name in empty} & set(int8.sparsity["weights"])
