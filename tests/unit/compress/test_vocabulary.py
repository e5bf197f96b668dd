"""`prune.vocabulary`: corpus texts keep their embeddings, teachers understand the student's ids, mistakes are reported."""

import copy
import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from helpers import DATA, RECIPE, SHORT, clipress, write_recipe

from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.prune.search import Prune
from clipress.compress.prune.vocabulary import Vocabulary, shrink
from clipress.compress.settings import Runtime
from clipress.compress.stage import stages_from
from clipress.data.dataset import TrainingSet
from clipress.data.sources import open_source
from clipress.data.spec import DataSpec, SourceSpec
from clipress.data.tokens import tokenizer_from_spec
from clipress.data.transforms import Augment
from clipress.data.vocabulary import kept_tokens
from clipress.errors import RecipeError
from clipress.models import anatomy
from clipress.models.load import new_model
from clipress.models.students import student_from
from clipress.models.tiny import tiny_architecture
from clipress.recipe import checked
from clipress.runtime.export_folder import read_export
from clipress.tasks import model_from_artifact, task_named
from clipress.tasks.training import TrainingJob

SPECS = (SourceSpec(format="scenes", limit=20), SourceSpec(format="digits", limit=3))
FORMS = [{}, {"custom_text": True}]
OUTSIDE = ["a zebra crossing in heavy rain", "\u65e5\u672c\u8a9e \U0001f600"]


@pytest.fixture(scope="module")
def context():
    return Context(start_fabric(Runtime(accelerator="cpu")), DataSpec(train=SPECS), 0, title="words")


def tiny(**more):
    return new_model(tiny_architecture(layers=1) | more, 0)


def shrunk(context, model=None, **given):
    return shrink(checked(Vocabulary, given, "v"), model or tiny(), context)


def corpus():
    """Return all captions and prompts of the training data."""
    scenes, digits = map(open_source, SPECS)
    prompts = [prompt for label in range(10) for prompt in digits.classes.prompts(label)]
    return [text for item in range(len(scenes)) for text in scenes.captions(item)] + prompts


def embeddings(model, texts):
    with torch.no_grad():
        return model.module.eval().encode_text(torch.from_numpy(model.tokenize()(texts)))


@pytest.mark.parametrize("form", FORMS)
def test_texts_of_the_training_data_keep_their_embeddings(context, form):
    before, (after, details) = tiny(**form), shrunk(context, tiny(**form))
    torch.testing.assert_close(embeddings(after, corpus()), embeddings(before, corpus()), atol=1e-6, rtol=0)
    tokens = details["vocabulary"]["tokens"]
    assert 514 < tokens < 800 and after.architecture["text_cfg"]["vocab_size"] == after.module.vocab_size == tokens
    assert before.architecture["text_cfg"]["vocab_size"] == 49408
    assert torch.isfinite(embeddings(after, OUTSIDE)).all()


def test_a_corpus_is_text_files_instead_of_the_data_or_beside_it(context, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(OUTSIDE), encoding="utf-8")
    alone, both, data = (
        {*kept_tokens(shrunk(context, **given)[0].tokenizer)}
        for given in ({"corpus": [file]}, {"corpus": [file], "data": True}, {})
    )
    assert alone | data == both and alone != both != data
    torch.testing.assert_close(
        embeddings(shrunk(context, corpus=[file])[0], OUTSIDE), embeddings(tiny(), OUTSIDE), atol=1e-6, rtol=0
    )


def test_a_rare_token_is_removed_with_min_count(context, tmp_path):
    (tmp_path / "texts.txt").write_text("circle circle square", encoding="utf-8")
    given = {"corpus": [tmp_path / "texts.txt"]}
    (all_tokens, _), (frequent, _) = shrunk(context, **given), shrunk(context, **given, min_count=2)
    assert {*kept_tokens(frequent.tokenizer)} < {*kept_tokens(all_tokens.tokenizer)}


def test_the_content_of_a_corpus_belongs_to_the_stage(tmp_path):
    file, dumps = tmp_path / "texts.txt", []
    for text in ("one", "two"):
        file.write_text(text)
        (stage,) = stages_from([{"prune": {"vocabulary": {"corpus": [str(file)]}}}])
        dumps.append(stage.settings.model_dump(mode="json"))
    assert dumps[0] != dumps[1] and str(file) in str(dumps[0])


@pytest.mark.parametrize("form", FORMS)
def test_ids_that_the_architecture_names_follow_their_tokens(context, form):
    architecture = tiny_architecture(layers=1) | form
    architecture["text_cfg"] |= {"pool_type": "eos", "eos_id": 49407, "no_causal_mask": True, "pad_id": 0}
    before, after = new_model(architecture, 0), shrunk(context, new_model(architecture, 0))[0]
    text = after.architecture["text_cfg"]
    assert (text["eos_id"], text["pad_id"]) == (text["vocab_size"] - 1, 0)
    torch.testing.assert_close(embeddings(after, corpus()), embeddings(before, corpus()), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("how", "rank"), [({"rank": 5}, 5), ({"params": 0.3}, 9), ({"energy": 0.5}, None)])
def test_the_table_becomes_two_factors(context, how, rank):
    model, details = shrunk(context, factorize=how)
    found = details["vocabulary"]
    assert found["tokens"] == 49408 and "kept" not in model.tokenizer  # All tokens stay.
    assert rank is None or found["rank"] == rank
    size = found["rank"] * (49408 + 32)
    assert anatomy.token_table(model.module).weight.shape == (49408, found["rank"])
    assert found["embedding_params_kept"] == pytest.approx(size / (49408 * 32), abs=1e-6)
    assert how.get("energy", 0) <= found["energy_kept"] <= 1


def test_a_reduced_vocabulary_is_factorized_and_reduced_again(context, tmp_path):
    (tmp_path / "texts.txt").write_text(corpus()[0], encoding="utf-8")
    model, _ = shrunk(context, data=True, factorize={"rank": 30})
    again, details = shrunk(context, model, corpus=[tmp_path / "texts.txt"], factorize={"rank": 28})
    rows = anatomy.token_table(again.module).weight
    assert rows.shape == (details["vocabulary"]["tokens"], 28) == (len(kept_tokens(again.tokenizer)), 28)
    near = torch.cosine_similarity(embeddings(again, corpus()[:1]), embeddings(tiny(), corpus()[:1]))
    assert near > 0.95


# teachers


def test_a_running_teacher_embeds_the_same_tokens(context):
    teacher = tiny()
    student, _ = shrunk(context)
    own, theirs = (
        TrainingSet([open_source(SPECS[0])], one.preprocess, one.tokenize(), Augment(), 0).ids(corpus())
        for one in (student, teacher)
    )
    job = TrainingJob("t", student, (teacher,), frozenset({"teacher"}), (), "both", context.sources(), False)
    lesson = task_named("clip").lesson(job)
    pixels = torch.zeros(len(own), 3, 32, 32)
    with torch.no_grad():
        found = lesson.module(teacher.module)(pixels=pixels, ids=torch.from_numpy(own))["text"]
        assert torch.equal(found, teacher.module.encode_text(torch.from_numpy(theirs)))
        plain = lesson.module(student.module)(pixels=pixels, ids=torch.from_numpy(own))["text"]
        assert torch.equal(plain, student.module.encode_text(torch.from_numpy(own)))


def test_a_teacher_with_fewer_tokens_than_the_student_is_refused(context):
    job = TrainingJob("t", tiny(), (shrunk(context)[0],), frozenset(), (), "both", context.sources(), False)
    with pytest.raises(RecipeError, match="expected the same tokenizer for teacher and student"):
        task_named("clip").lesson(job)


def test_a_new_student_has_its_teachers_reduced_vocabulary(context):
    teacher, _ = shrunk(context)
    student = student_from({"image": "vit-1x32-p8", "text": "1x32"}, teacher, 0)
    assert student.tokenizer == teacher.tokenizer and student.module.vocab_size == teacher.module.vocab_size
    np.testing.assert_array_equal(student.tokenize()(corpus()), teacher.tokenize()(corpus()))


# mistakes


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({}, "expected a budget, a vocabulary or both"),
        ({"vocabulary": {}, "steps": 5}, "without a budget nothing is trained"),
        ({"vocabulary": {"data": False}}, "expected texts whose tokens are kept, found none"),
        ({"vocabulary": {"factorize": {"rank": 8}, "min_count": 2}}, "expected texts whose tokens are kept"),
        ({"vocabulary": {"factorize": {}}}, "exactly one of rank, energy, params; found none"),
        ({"vocabulary": {"factorize": {"rank": 8, "params": 0.5}}}, "found rank, params"),
        ({"vocabulary": {"factorize": {"params": 1.5}}}, "less than 1"),
        ({"vocabulary": {"corpora": []}}, "Did you mean 'corpus'|unknown key 'corpora'"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(prune, message):
    with pytest.raises(RecipeError, match=message):
        checked(Prune, prune, "stages.0.prune")


@pytest.mark.parametrize(
    ("change", "given", "message"),
    [
        ({}, {"corpus": ["nowhere.txt"]}, "expected a text file, found none at nowhere.txt"),
        ({}, {"factorize": {"rank": 32}}, "expected a rank from 1 to 31"),
        ({}, {"factorize": {"params": 0.001}}, "found 0. Change params"),
        (
            {"tokenizer": {"name": "clip-bpe", "context_length": 24, "kwargs": {"clean": "whitespace"}}},
            {},
            "own tokenizer",
        ),
    ],
)
def test_what_a_model_does_not_allow_is_refused(context, change, given, message):
    with pytest.raises(RecipeError, match=message):
        shrunk(context, replace(tiny(), **change), **given)


def test_a_classifier_has_no_token_embedding(context):
    section = {"width": 32, "layers": 1, "heads": 2, "patch_size": 8, "image_size": 16, "labels": ["a", "b"]}
    with pytest.raises(RecipeError, match="has no token embedding"):
        shrunk(context, task_named("classification").student_from(section, None, 0))


# the whole pipeline


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A teacher, its reduced and factorised copy, distilled, pruned and INT8: exported and measured."""
    recipe = copy.deepcopy(RECIPE) | {
        "data": DATA,
        "stages": [
            {"prune": {"name": "words", "vocabulary": {}}},
            {"prune": {"name": "factors", "vocabulary": {"factorize": {"params": 0.6}}}},
            {"distill": {"losses": ["contrastive", "feature", "tokens"], **SHORT}},
            {
                "prune": {
                    "budget": {"params": 0.7},
                    "align": {"head_dim": 4, "ffn": 16},
                    "distill_losses": ["affinity"],
                    **SHORT,
                }
            },
            {"quantize": {"calibrate": 32, **SHORT, "steps": 1}},
        ],
    }
    folder = tmp_path_factory.mktemp("vocabulary")
    result = clipress("run", write_recipe(recipe, folder), "--out", folder / "run")
    assert result.exit_code == 0, result.output
    return folder / "run"


def test_every_export_of_a_reduced_model_agrees_and_is_smaller(run):
    sizes = {path.name: (path / "text.onnx").stat().st_size for path in (run / "export").iterdir() if path.is_dir()}
    assert sizes["words"] < 0.1 * sizes["teacher"] and sizes["factors"] < sizes["words"]
    assert sizes["int8"] < sizes["recovered"]
    for stage in ("words", "factors", "int8"):
        exported = read_export(run / "export" / stage)
        made = model_from_artifact(run / stage)
        assert exported.tokenizer.kept == made.tokenizer["kept"] and min(exported.least_cosines.values()) > 0.99
        np.testing.assert_array_equal(exported.tokenize()(OUTSIDE), made.tokenize()(OUTSIDE))


def test_removing_tokens_alone_changes_no_figure(run):
    results = json.loads((run / "bench" / "results.json").read_text())
    figures = {row["stage"]: row["accuracy"] for row in results["rows"]}
    assert figures["words"] == figures["teacher"]


def test_the_table_of_an_int8_file_is_int8(run):
    stored = {item.name: item for item in onnx.load(run / "export" / "int8" / "text.onnx").graph.initializer}
    (table,) = [item for name, item in stored.items() if name.endswith("rows.weight_int8")]
    assert table.data_type == onnx.TensorProto.INT8 and table.dims[0] < 1024
    assert any(
        "token_embedding.up" in name
        for name in json.loads((run / "int8" / "clipress.json").read_text())["quantization"]["modules"]
    )


def test_a_server_tokenizes_with_the_reduced_vocabulary(run):
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    texts, expected = [*corpus()[:3], *OUTSIDE], model_from_artifact(run / "words")
    configs = [*(run / "triton").glob("*/tokenize/config.pbtxt")]
    for path in configs:
        described = text_format.Parse(path.read_text(), ModelConfig()).parameters["tokenizer"].string_value
        assert json.loads(described) == expected.tokenizer
        np.testing.assert_array_equal(tokenizer_from_spec(json.loads(described))(texts), expected.tokenize()(texts))
    assert configs
