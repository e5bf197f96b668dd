"""Recipes of version 1 are upgraded without a change in meaning."""

import pytest
import yaml

from clipress.errors import RecipeError
from clipress.recipe import read_recipe
from clipress.recipe_v1 import BENCH_KEYS, LOSSES, RUNTIME_KEYS, SOURCE_KEYS, STAGE_KEYS, upgrade
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


def read(raw, folder):
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return plan_from(read_recipe(folder / "recipe.yaml"))


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


def test_no_new_key_is_also_an_old_key():
    for table in (STAGE_KEYS, RUNTIME_KEYS, SOURCE_KEYS, BENCH_KEYS, LOSSES):
        assert not set(table) & set(table.values())
