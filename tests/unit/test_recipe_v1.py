"""Recipes of version 1 are upgraded without a change in meaning."""

import pytest
import yaml

from clipress.compress.losses import LOSSES, VERSION_1
from clipress.compress.settings import Training
from clipress.compress.stage import STAGES, StageKind
from clipress.errors import RecipeError
from clipress.recipe import read_recipe
from clipress.recipe_v1 import BENCH_KEYS, RUNTIME_KEYS, SOURCE_KEYS, STAGE_KEYS, upgrade
from clipress.workflow.plan import plan_from

OLD = {
    "name": "old",
    "teacher": {
        "recipe": {
            "name": "teacher",
            "student": {"vision_cfg": {}, "text_cfg": {}},
            "data": {"train": [{"format": "digits", "share": 2}]},
            "stages": [{"distill": {"steps": 1, "warmup": 0.5}}],
        }
    },
    "data": {"train": [{"format": "scenes", "share": 3}]},
    "stages": [
        {
            "prune": {
                "budget": {"params": 0.5},
                "guide": ["affinity"],
                "frozen": 0.1,
                "interval": 7,
                "floor": {"ffn": 0.3},
                "steps": 9,
            }
        },
        {
            "distill": {
                "losses": {"ita": 1, "kl": 2, "ce": 3, "labels": 4},
                "queue": 8,
                "clip": 5,
                "decay": "constant",
                "steps": 1,
            }
        },
        {"quantize": {"keep": ["a"], "losses": ["ita"], "steps": 1}},
    ],
    "runtime": {"accumulate": 2, "checkpoint": 9, "checkpointing": True},
    "bench": {"max_loss": 2, "two_four": True},
}


def read(raw, folder, overrides=None):
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return plan_from(read_recipe(folder / "recipe.yaml", overrides))


def test_every_version_1_key_still_works(tmp_path):
    plan = read(OLD, tmp_path)
    prune, distill, quantize = (stage.settings for stage in plan.stages)
    assert (prune.distill_losses, prune.final_fraction, prune.update_every, prune.min_keep.ffn) == (
        ("affinity",),
        0.1,
        7,
        0.3,
    )
    assert distill.losses == {"momentum-contrastive": 1, "embedding-kl": 2, "embedding-ce": 3, "classification": 4}
    assert (distill.queue_size, distill.grad_clip_norm, distill.lr_schedule) == (8, 5, "constant")
    assert (quantize.exclude, quantize.losses) == (("a",), ("momentum-contrastive",))
    runtime = plan.runtime
    assert (runtime.grad_cache_chunks, runtime.checkpoint_every, runtime.grad_checkpointing) == (2, 9, True)
    assert (plan.bench.max_accuracy_drop, plan.bench.use_sparse_kernels) == (2, True)
    assert plan.data.train[0].weight == 3
    inner = plan.teachers[0].recipe
    assert inner["data"]["train"][0] == {"format": "digits", "weight": 2}
    assert inner["stages"][0]["distill"]["warmup_ratio"] == 0.5


def test_a_teacher_recipe_in_its_own_file_is_upgraded(tmp_path):
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(OLD["teacher"]["recipe"]))
    plan = read({**OLD, "teacher": {"recipe": "teacher.yaml"}}, tmp_path)
    assert plan.teachers[0].recipe["stages"][0]["distill"] == {"steps": 1, "warmup_ratio": 0.5}


def test_an_old_key_next_to_its_new_name_is_refused(tmp_path):
    raw = {**OLD, "runtime": {"accumulate": 2, "grad_cache_chunks": 4}}
    with pytest.raises(RecipeError, match="unknown key 'accumulate'"):
        read(raw, tmp_path)


def test_an_upgraded_recipe_is_left_unchanged():
    new = upgrade(OLD)
    assert upgrade(new) == new


@pytest.mark.parametrize(
    "raw", [{"stages": 3}, {"stages": [4, {"prune": None}]}, {"data": []}, {"teacher": [None, 1]}, {"runtime": "x"}]
)
def test_malformed_recipes_are_left_for_validation(raw):
    assert upgrade(raw) == raw


NEW, OLDER = ("grad_cache_chunks", "grad_clip_norm", "weight"), ("accumulate", "clip", "share")


@pytest.mark.parametrize("names", [NEW, OLDER], ids=["new", "old"])
@pytest.mark.parametrize("raw", [OLD, upgrade(OLD)], ids=["of version 1", "of today"])
def test_overrides_replace_values_by_their_old_or_new_names(tmp_path, raw, names):
    chunks, norm, weight = names
    overrides = {
        f"runtime.{chunks}": 4,
        f"stages.1.distill.{norm}": 7,
        f"data.train.0.{weight}": 9,
        f"teacher.recipe.data.train.0.{weight}": 8,
        "bench": {"max_loss": 5},
    }
    plan = read(raw, tmp_path, overrides)
    assert plan.runtime.grad_cache_chunks == 4 and plan.bench.max_accuracy_drop == 5
    assert plan.stages[1].settings.grad_clip_norm == 7 and plan.data.train[0].weight == 9
    assert plan.teachers[0].recipe["data"]["train"][0]["weight"] == 8


def test_overrides_reach_one_of_several_teachers(tmp_path):
    raw = {**OLD, "teacher": [OLD["teacher"], OLD["teacher"]]}
    plan = read(raw, tmp_path, {"teacher.1.recipe.stages.0.distill.warmup": 0.25})
    assert [one.recipe["stages"][0]["distill"]["warmup_ratio"] for one in plan.teachers] == [0.5, 0.25]


class Own(Training):
    keep: str = "nothing"
    losses: tuple[str, ...] = ()


def test_a_plugins_stage_keeps_its_own_names(tmp_path):
    kind = StageKind("own", Own, lambda *_: None, "own", {})
    raw = {**OLD, "stages": [{"own": {"keep": "all", "losses": ["ita"], "steps": 1}}]}
    with STAGES.registered("own", kind), LOSSES.registered("ita", LOSSES["l1"]):
        settings = read(raw, tmp_path, {"stages.0.own.keep": "some"}).stages[0].settings
    assert (settings.keep, settings.losses) == ("some", ("ita",))


def test_a_plugins_loss_of_an_old_name_is_that_loss(tmp_path):
    raw = {**OLD, "stages": [{"distill": {"losses": ["kl", "ce"], "steps": 1}}]}
    with LOSSES.registered("kl", LOSSES["l1"]):
        assert read(raw, tmp_path).stages[0].settings.losses == ("kl", "embedding-ce")
    assert read(raw, tmp_path).stages[0].settings.losses == ("embedding-kl", "embedding-ce")


def test_an_old_loss_next_to_its_new_name_is_refused(tmp_path):
    raw = {**OLD, "stages": [{"distill": {"losses": {"kl": 1, "embedding-kl": 2}, "steps": 1}}]}
    with pytest.raises(RecipeError, match="unknown loss 'kl'"):
        read(raw, tmp_path)


def test_no_new_key_is_also_an_old_key():
    for table in (*STAGE_KEYS.values(), RUNTIME_KEYS, SOURCE_KEYS, BENCH_KEYS, VERSION_1):
        assert not set(table) & set(table.values())
