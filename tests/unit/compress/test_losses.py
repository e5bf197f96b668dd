"""Every loss against a slow double-precision reference, gradients included."""

import math

import pytest
import torch

from clipress.compress.losses import (
    TERMS,
    Batch,
    Features,
    Momentum,
    compute,
    needs_of,
    terms_from,
)
from clipress.errors import RecipeError

B, D = 5, 4


def features(seed, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    image, text = (
        torch.nn.functional.normalize(
            torch.randn(B, D, generator=generator, dtype=torch.float64), dim=-1
        ).requires_grad_(requires_grad)
        for _ in range(2)
    )
    return Features(image, text, image, text, torch.tensor(7.0 + seed, dtype=torch.float64))


def targets():
    group = torch.tensor([0, 1, 2, 1, 3])
    same = (group[:, None] == group[None]).double()
    return same / same.sum(1, keepdim=True)


def momentum():
    """A slow copy's view of the batch with two past pairs in the queue, one of them of a group of the batch."""
    generator = torch.Generator().manual_seed(9)

    def unit(rows):
        return torch.nn.functional.normalize(torch.randn(rows, D, generator=generator, dtype=torch.float64), dim=-1)

    group, seen = torch.tensor([0, 1, 2, 1, 3]), torch.tensor([0, 1, 2, 1, 3, 1, 7])
    same = (group[:, None] == seen[None]).double()
    rows = [unit(n) for n in (B, B, B + 2, B + 2, B + 2, B + 2)]
    return Momentum(*rows, targets=same / same.sum(1, keepdim=True), share=0.3)


def mixed(a, b, share):
    return [[share * x + (1 - share) * float(y) for x, y in zip(p, q, strict=True)] for p, q in zip(a, b, strict=True)]


def squares(a, b):
    count = sum(len(row) for row in a)
    return sum((x - y) ** 2 for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)) / count


def cross_entropy(scores, wanted):
    """Mean over rows of -sum wanted log softmax(scores), with Python floats and loops."""
    total = 0
    for row, aim in zip(scores, wanted, strict=True):
        highest = max(float(s.detach()) for s in row)
        norm = sum((s - highest).exp() for s in row)
        total = total - sum(a * (s - highest - norm.log()) for s, a in zip(row, aim, strict=True))
    return total / len(scores)


def dots(a, b, scale):
    return [[scale * sum(x * y for x, y in zip(u, v, strict=True)) for v in b] for u in a]


def softmax(rows):
    shares = []
    for row in rows:
        weights = [math.exp(float(s)) for s in row]
        shares.append([w / sum(weights) for w in weights])
    return shares


def slow(name, s, t, aims):
    if name == "contrastive":
        return (
            cross_entropy(dots(s.image, s.text, s.scale), aims) + cross_entropy(dots(s.text, s.image, s.scale), aims)
        ) / 2
    if name == "affinity":
        a = cross_entropy(dots(s.image, s.text, s.scale), softmax(dots(t.image, t.text, t.scale)))
        return (a + cross_entropy(dots(s.text, s.image, s.scale), softmax(dots(t.text, t.image, t.scale)))) / 2
    if name == "feature":
        return squares(s.image, t.image) + squares(s.text, t.text)
    if name == "interactive":
        return (
            cross_entropy(dots(s.image, t.text, s.scale), aims) + cross_entropy(dots(s.text, t.image, s.scale), aims)
        ) / 2
    slow_copy, scale = momentum(), s.scale.detach()
    total = 0
    for query, slow_query, keys, asked, known in (
        (s.image, slow_copy.image, slow_copy.all_text, t.image, slow_copy.teacher_text),
        (s.text, slow_copy.text, slow_copy.all_image, t.text, slow_copy.teacher_image),
    ):
        logits, opinion = dots(query, keys, s.scale), softmax(dots(slow_query, keys, scale))
        if name == "ita":
            total = total + cross_entropy(logits, mixed(opinion, slow_copy.targets, slow_copy.share)) / 2
        elif name == "upop-kd":
            truth = dots(asked, known, t.scale)
            total = total + cross_entropy(logits, mixed(opinion, softmax(truth), slow_copy.share)) / 2
            total = total + squares(logits, truth) / 2 + squares(query, asked) / 2
        else:
            raise AssertionError(f"no reference for {name}")
    return total


@pytest.mark.parametrize("name", TERMS)
def test_a_loss_and_its_gradient_equal_the_slow_reference(name):
    found_from, wanted_from, teacher = features(0, True), features(0, True), features(1)
    aims = targets()
    found, parts = compute({name: 2.0}, Batch(found_from, (teacher,), aims, momentum()))
    wanted = 2.0 * slow(name, wanted_from, teacher, aims)
    assert found.item() == pytest.approx(float(wanted.detach()), rel=1e-12) and set(parts) == {name}
    found.backward()
    wanted.backward()
    for own, other in ((found_from.image, wanted_from.image), (found_from.text, wanted_from.text)):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_guided_upop_only_ranks_on_the_steps_that_move_the_masks():
    student, teacher, slow_copy = features(0), features(1), momentum()
    _, still = compute({"upop-kd": 1.0}, Batch(student, (teacher,), targets(), slow_copy))
    _, moving = compute({"upop-kd": 1.0}, Batch(student, (teacher,), targets(), slow_copy, masks_move=True))
    copied = 0.0
    for query, asked, known, keys in (
        (student.image, teacher.image, slow_copy.teacher_text, slow_copy.all_text),
        (student.text, teacher.text, slow_copy.teacher_image, slow_copy.all_image),
    ):
        copied += float(squares(dots(query, keys, student.scale), dots(asked, known, teacher.scale))) / 2
        copied += float(squares(query, asked)) / 2
    assert copied > 0 and (still["upop-kd"] - moving["upop-kd"]).item() == pytest.approx(copied, rel=1e-9)


def test_absent_terms_are_not_computed(monkeypatch):
    from clipress.compress.losses.feature import Feature

    def never(self, batch):
        raise AssertionError("computed though absent")

    monkeypatch.setattr(Feature, "forward", never)
    compute({"contrastive": 1.0}, Batch(features(0), (), targets()))
    with pytest.raises(AssertionError, match="though absent"):
        compute({"feature": 1.0}, Batch(features(0), (features(1),), targets()))


def test_names_without_weights_get_the_published_ones():
    terms = terms_from(("contrastive", "feature"), "x")
    assert {name: settings.weight for name, settings in terms.items()} == {"contrastive": 1.0, "feature": 2000.0}
    assert terms_from({"feature": 3}, "x")["feature"].weight == 3.0
    assert "teacher" in needs_of(terms) and "teacher" not in needs_of(terms_from(("contrastive", "ita"), "x"))
    assert "momentum" in needs_of(terms_from(("ita",), "x"))
    with pytest.raises(RecipeError, match="Did you mean 'affinity'"):
        terms_from(("afinity",), "x")
    with pytest.raises(RecipeError, match=r"unknown key 'wieght'\. Did you mean 'weight'"):
        terms_from({"feature": {"wieght": 1}}, "x")
