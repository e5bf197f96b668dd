"""Recipes are validated on reading, with messages that name the mistake and the correct form."""

import pytest
import yaml

from clipress.compress.plan import compress_plan_from
from clipress.compress.stage import stages_from
from clipress.errors import ArtifactError, RecipeError
from clipress.recipe import Recipe, Section, checked, overrides_from, read_recipe, read_typed, recipe_text

TRAIN = {"steps": 1}


def write(tmp_path, content):
    path = tmp_path / "r.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def test_overrides_reach_any_key_and_are_saved(tmp_path, recipe):
    read = read_recipe(write(tmp_path, recipe), overrides_from(["seed=7", "stages.0.prune.steps=3", "bench.threads=2"]))
    assert (read.seed, read.stages[0]["prune"]["steps"], read.bench["threads"]) == (7, 3, 2)
    again = read_recipe(write(tmp_path, recipe_text(read)))
    assert again == read


@pytest.mark.parametrize("override", ["seed", "stages.9.prune.steps=1", "name.x=1", "stages.x=1", "seed=[1"])
def test_an_override_of_an_unknown_key_is_reported(tmp_path, recipe, override):
    with pytest.raises(RecipeError, match=r"Override (seed|stages|name)"):
        read_recipe(write(tmp_path, recipe), overrides_from([override]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(stagse=[]), r"unknown key 'stagse'\. Did you mean 'stages'"),
        (lambda r: r["stages"][0]["prune"].update(criterium="fisher"), r"stages\.0\.prune.*'criterium'.*'criterion'"),
        (lambda r: r["stages"][0]["prune"]["budget"].update(param=0.5), r"unknown key 'param'\. Did you mean 'params'"),
        (lambda r: r["stages"][0]["prune"]["budget"].update(params=1.5), r"less than 1 \(found 1\.5\)"),
        (lambda r: r["stages"][0]["prune"].update(criterion="fischer"), r"criterion.*'fisher'"),
        (lambda r: r["stages"][1]["distill"].update(losses=["fature"]), "Did you mean 'feature'"),
        (lambda r: r["stages"][1]["distill"].update(steps="many"), r"valid integer.*'many'"),
        (lambda r: r["stages"][1]["distill"].update(epochs=1), "either 'steps' or 'epochs'"),
        (lambda r: r["stages"][1].update(prune={}), "one stage kind"),
        (lambda r: r["stages"].append({"prun": {}}), "Did you mean 'prune'"),
        (lambda r: r["data"].pop("train"), r"data\.train: this key is required"),
        (
            lambda r: r["data"]["train"][0].update(splitt="val"),
            r"data\.train\.0\.splitt: unknown key 'splitt'\. Did you mean 'split'",
        ),
        (lambda r: r.pop("teacher"), "set 'teacher', 'student' or both"),
        (lambda r: r["teacher"].update(model="ViT-B-32"), "exactly one of"),
        (lambda r: r["teacher"]["recipe"]["stages"].append({"sparsfy": {}}), "Did you mean 'sparsify'"),
    ],
)
def test_a_mistake_is_reported_with_the_correct_form(recipe, change, message):
    change(recipe)
    with pytest.raises(RecipeError, match=message):
        compress_plan_from(checked(Recipe, recipe, ""))


@pytest.mark.parametrize("content", ["- a list", "text", "a: [1", "? [x]\n: 1", "\x00"])
def test_a_file_that_is_not_a_recipe_is_reported(tmp_path, content):
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        read_recipe(write(tmp_path, content))


def test_yaml_cannot_run_code(tmp_path):
    with pytest.raises(RecipeError, match="not valid YAML"):
        read_recipe(write(tmp_path, "name: !!python/object/apply:os.system ['true']"))


@pytest.mark.parametrize(
    "order",
    [
        ("sparsify", "prune"),
        ("quantize", "prune"),
        ("quantize", "sparsify"),
        ("quantize", "distill"),
        ("quantize", "quantize"),
    ],
)
def test_an_impossible_order_is_reported_with_a_valid_one(order):
    settings = {"prune": {"budget": {"params": 0.5}, **TRAIN}}
    with pytest.raises(RecipeError, match=f"{order[1]} cannot come after {order[0]}.*prune -> distill -> sparsify"):
        stages_from([{kind: settings.get(kind, TRAIN)} for kind in order])


def test_artifacts_are_named_after_their_kind():
    prune = {"prune": {"budget": {"params": 0.5}, **TRAIN}}
    names = [
        s.name
        for s in stages_from(
            [{"distill": TRAIN}, prune, {"distill": TRAIN}, prune, {"distill": TRAIN}, {"quantize": TRAIN}]
        )
    ]
    assert names == ["distilled", "pruned", "recovered", "pruned-2", "recovered-2", "int8"]


def test_a_name_that_is_not_a_folder_name_is_refused():
    with pytest.raises(RecipeError, match="names a folder"):
        stages_from([{"distill": {"name": "../up", **TRAIN}}])


class Described(Section):
    count: int
    where: str = ""


def test_a_file_of_ours_is_read_as_its_type_with_what_it_does_not_say(tmp_path):
    assert read_typed(Described, write(tmp_path, '{"count": 3}'), "", where="here") == Described(count=3, where="here")
    with pytest.raises(FileNotFoundError):
        read_typed(Described, tmp_path / "none.json", "")


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"count": "many"}', '{"count": 1, "other": 1}', "[" * 100_000])
def test_a_damaged_file_of_ours_is_one_message_that_ends_with_what_to_do(tmp_path, content):
    with pytest.raises(ArtifactError, match=r"^\S*r\.yaml\b.*\. Make it again\.$"):
        read_typed(Described, write(tmp_path, content), "Make it again.")
