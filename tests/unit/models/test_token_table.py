"""A smaller token embedding: fewer rows, or two factors, in both forms of open_clip's text tower."""

import pytest
import torch

from clipress.artifact import Artifact, load_artifact, save_artifact
from clipress.errors import ArtifactError
from clipress.models import anatomy, residual, surgery, token_table
from clipress.models.load import artifact_from_model, new_model, save_for_open_clip
from clipress.models.tiny import tiny_architecture
from clipress.models.weight_inheritance import Size, inherited
from clipress.tasks import model_from_artifact

KEPT = [*range(400), 499]
FORMS = [{}, {"custom_text": True}]


def model(seed=0, **more):
    architecture = tiny_architecture(layers=1) | more
    architecture["text_cfg"]["vocab_size"] = 500
    return new_model(architecture, seed)


def ids(last=499):
    rows = torch.randint(1, 400, (4, 24), generator=torch.Generator().manual_seed(0))
    rows[:, -1] = last
    return rows


def texts(module, rows):
    with torch.no_grad():
        return module.eval().encode_text(rows)


def factorized(made, rank, weights=None):
    _, directions = token_table.components(made.module, torch.ones(500) if weights is None else weights)
    token_table.factorize(made.module, directions[:, :rank])
    return made


@pytest.mark.parametrize("form", FORMS)
def test_kept_rows_give_the_same_embeddings_under_their_new_ids(form):
    made = model(**form)
    expected = texts(made.module, ids())
    token_table.keep_rows(made.module, KEPT)
    assert torch.equal(texts(made.module, ids(last=400)), expected)
    assert made.module.vocab_size == anatomy.token_table(made.module).num_embeddings == 401


@pytest.mark.parametrize("form", FORMS)
def test_all_components_are_the_table_and_fewer_are_its_truncated_svd(form):
    made = model(**form)
    table, expected = anatomy.token_table(made.module).weight.detach().clone(), texts(made.module, ids())
    torch.testing.assert_close(texts(factorized(made, 32).module, ids()), expected, atol=1e-5, rtol=1e-4)
    small = factorized(model(**form), 8).module
    embedding = anatomy.text_root(small)[1].token_embedding
    left, values, right = torch.linalg.svd(table.double(), full_matrices=False)
    with torch.no_grad():
        found = embedding(torch.arange(500))
    torch.testing.assert_close(found.double(), (left[:, :8] * values[:8]) @ right[:8], atol=1e-6, rtol=1e-4)


def test_weighted_rows_are_approximated_better():
    weights = torch.ones(500)
    weights[:8] = 1e6
    made = model()
    table = anatomy.token_table(made.module).weight.detach().clone()
    with torch.no_grad():
        found = factorized(made, 8, weights).module.token_embedding(torch.arange(500))
    errors = (found - table).norm(dim=1) / table.norm(dim=1)
    assert errors[:8].max() < 0.01 and errors[8:].mean() > 0.5


@pytest.mark.parametrize("form", FORMS)
def test_a_factorized_model_is_read_back_with_bitwise_equal_outputs(tmp_path, form):
    made = factorized(model(**form), 8)
    save_artifact(artifact_from_model(made, (), {}), tmp_path / "a")
    again = model_from_artifact(load_artifact(tmp_path / "a"))
    assert torch.equal(texts(again.module, ids()), texts(made.module, ids()))
    assert not save_for_open_clip(again, tmp_path / "open_clip")


def test_only_the_rows_count_as_embeddings():
    before, after = anatomy.counts(model().module), anatomy.counts(factorized(model(), 8).module)
    assert before["params"] - after["params"] == 500 * 32 - (500 * 8 + 8 * 32)
    assert after["params_without_embeddings"] - before["params_without_embeddings"] == 8 * 32


def test_the_width_of_a_tower_with_a_factorized_embedding_can_be_inherited():
    teacher = factorized(model(), 8)
    student = inherited(teacher, {"text": Size(width=16)})
    kept = [
        channel
        for channel in range(32)
        if torch.isin(teacher.module.positional_embedding[:, channel], student.module.positional_embedding).all()
    ]
    assert len(kept) == 16 and residual.residual_axes(student.module, "text")["token_embedding.up.weight"] == (0, None)
    with torch.no_grad():
        whole, small = (one.module.token_embedding(ids()) for one in (teacher, student))
    torch.testing.assert_close(small, whole[..., kept])


@pytest.mark.parametrize("rank", [0, 33, -1, 1e9, "8", None, 10**30])
def test_an_impossible_rank_is_refused_before_memory_is_taken(rank):
    artifact = artifact_from_model(factorized(model(), 8), (), {})
    shapes = {**artifact.shapes, "token_embedding": {"rank": rank}}
    with pytest.raises(ArtifactError, match="expected a rank from 1 to 32"):
        model_from_artifact(Artifact(**{**artifact.__dict__, "shapes": shapes}))


def test_a_factorized_embedding_is_recorded_beside_the_parts():
    assert surgery.shapes(factorized(model(), 8).module)["token_embedding"] == {"rank": 8}
    assert "token_embedding" not in surgery.shapes(model().module)
