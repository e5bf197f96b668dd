"""Every loss and its gradients against a slow double-precision reference, and the properties of single losses."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from clipress.compress.losses import LOSSES, Objective, needs_of, terms_from
from clipress.errors import RecipeError
from clipress.tasks.clip import MAX_LOG_SCALE, SIDES, positives
from clipress.tasks.training import Batch, Features, Momentum, Sizes

PAIRS, WIDTH, TOKENS, TOKEN_WIDTH, QUEUE, CLASSES = 6, 4, 3, 3, 2, 3
GROUPS = torch.tensor([0, 1, 2, 1, 3, 0])  # two groups appear twice, once in each half
LABELS = torch.tensor([2, -1, -1, 0, 1, 1])  # the halves have different numbers of labels
PATCHES, PIXELS = 2, 6
MASKS = torch.randint(0, CLASSES, (PAIRS, PIXELS, PIXELS), generator=torch.Generator().manual_seed(50))
MASKS[0, :4] = 255  # the halves have different numbers of labelled pixels
WORDS = torch.tensor([2, 0, 1, 0, 1, 1])
WEIGHTS = torch.tensor([0.1, 0.0, 0.2, 0.4, 0.25, 0.05], dtype=torch.float64)  # the second token is padding
MATCH_WEIGHTS = torch.ones(PAIRS, 3, dtype=torch.float64)
MATCH_WEIGHTS[4, 1:] = 0  # the halves have different numbers of wrong pairs
VARIANTS = [
    *((name, {}) for name in LOSSES),
    ("interactive", {"published": True}),
    ("fused", {"published": True}),
    ("gradient", {"published": True}),
    ("embedding-ce", {"published": True}),
    ("ensemble", {"scales": (3.0, 8.0)}),
    ("tokens", {"norm": False}),
    ("embedding-kl", {"temperature": 1.5}),
    ("classification", {"scale": 5.0}),
    ("logits", {"temperature": 1.5}),
    ("lm", {"smoothing": 0.0}),
]
BOTH_WIDTHS = [
    pytest.param(name, settings, wide, id=f"{name}{settings or ''}{'-wide' * wide}")
    for name, settings in VARIANTS
    for wide in (False, True)
    if not (wide and "width" in needs_of(terms_from((name,), "x")))
]


def noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves(seed, width=WIDTH, token_width=TOKEN_WIDTH):
    """Raw outputs of one model."""
    rows = {side: noise(PAIRS, width, seed=seed + n) for n, side in enumerate((*SIDES, "masked"))}
    rows |= {f"{side}_tokens": noise(PAIRS, TOKENS, token_width, seed=seed + n) for n, side in enumerate(SIDES)}
    rows["scores"] = noise(PAIRS, CLASSES, PATCHES, PATCHES, seed=seed + 6)
    rows["logits"] = noise(PAIRS, CLASSES, seed=seed + 5)
    rows["matches"] = noise(PAIRS, 3, 2, seed=seed + 7)
    return rows | {"scale": torch.tensor(5.0 + seed / 10, dtype=torch.float64)}


def world(wide=False):
    """A student, two teachers of different widths, an EMA model with a queue, groups, labels and classes."""
    width = WIDTH + wide
    student = {name: tensor.requires_grad_() for name, tensor in leaves(0).items()}
    teachers = leaves(10, width, TOKEN_WIDTH + wide), leaves(20, WIDTH + 3)
    shapes = [(PAIRS, WIDTH)] * 2 + [(PAIRS + QUEUE, WIDTH)] * 2 + [(PAIRS + QUEUE, width)] * 2
    targets = positives(GROUPS, torch.cat([GROUPS, torch.tensor([1, 7])])).double()
    slow = [F.normalize(noise(*shape, seed=30 + k), dim=-1) for k, shape in enumerate(shapes)]
    classes = F.normalize(noise(3, width, seed=40), dim=-1)
    return SimpleNamespace(
        student=student, teachers=teachers, momentum=Momentum(*slow, targets=targets, alpha=0.3), classes=classes
    )


def objective(terms, wide=False, sides=SIDES):
    shapes = [dict.fromkeys(SIDES, (TOKENS, TOKEN_WIDTH + extra)) for extra in (0, wide)]
    sizes = Sizes(WIDTH, (WIDTH + wide, WIDTH + 3), sides, (32, 32), *shapes)
    return Objective(terms_from(terms, "x"), sizes).double()


def features(model, rows, maps=None, sides=SIDES, logits=False):
    given = {"image": model["image"], "text": model["text"], "masked": model["masked"]}
    if maps:
        given = {name: maps["text" if name == "text" else "image"](given[name]) for name in given}
    unit = {name: F.normalize(rows_of, dim=-1) for name, rows_of in given.items()}
    seen = {f"raw_{side}": given[side][rows] for side in sides} | {side: unit[side][rows] for side in sides}
    seen |= {f"all_{side}": unit[side] for side in sides}
    seen["tokens"] = {side: model[f"{side}_tokens"][rows] for side in sides}
    seen |= {name: model[name][rows] for name in ("scores", "matches")}
    absent = dict.fromkeys(("image", "text", "all_image", "all_text"))
    scores = model["logits"][rows] if logits else None  # only classifiers have logits
    return Features(**absent | seen, scale=model["scale"], masked_image=unit["masked"][rows], logits=scores)


def batch(of, losses, rows=slice(None), sides=SIDES):
    """The batch of a process that holds these rows."""
    has_words = "words" in losses.needs
    has_logits = has_words or "logits" in losses.needs
    teacher_sides = SIDES if {"keys", "pairs"} & losses.needs else sides
    slow = replace(of.momentum, **{name: getattr(of.momentum, name)[rows] for name in ("image", "text", "targets")})
    return Batch(
        features(of.student, rows, sides=sides, logits=has_logits),
        tuple(features(teacher, rows, sides=teacher_sides, logits=has_logits) for teacher in of.teachers),
        positives(GROUPS, GROUPS)[rows].double(),
        GROUPS,
        slow,
        features(of.student, rows, losses.projections, sides) if losses.projections else None,
        WORDS[rows] if has_words else LABELS[rows],
        LABELS,
        of.classes,
        sides=sides,
        masks=MASKS[rows],
        all_masks=MASKS,
        match_weights=MATCH_WEIGHTS[rows],
        all_match_weights=MATCH_WEIGHTS,
        weights=WEIGHTS[rows] * PAIRS / len(WEIGHTS[rows]) if has_words else None,
    )


# The references are Python loops over numbers that use nothing from the package.


def linear(rows, layer):
    return [[b + dot(w, row) for w, b in zip(layer.weight, layer.bias, strict=True)] for row in rows]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(rows):
    return [[x / dot(row, row).sqrt() for x in row] for row in rows]


def view(model, maps=None):
    given = {name: list(model[name]) for name in (*SIDES, "masked")}
    if maps:
        given = {name: linear(rows, maps["text" if name == "text" else "image"]) for name, rows in given.items()}
    seen = {name: unit(rows) for name, rows in given.items()} | {f"raw_{name}": rows for name, rows in given.items()}
    tokens = {f"{side}_tokens": list(model[f"{side}_tokens"].flatten(0, 1)) for side in SIDES}
    return SimpleNamespace(
        **seen, **tokens, scores=model["scores"], scale=model["scale"], logits=list(map(list, model["logits"]))
    )


def dots(a, b, scale):
    return [[scale * dot(u, v) for v in b] for u in a]


def turned(rows):
    return list(map(list, zip(*rows, strict=True)))


def softmax(rows):
    shares = []
    for row in rows:
        weights = [x.exp() for x in row]
        shares.append([w / sum(weights) for w in weights])
    return shares


def cross_entropy(scores, expected):
    """Mean over rows of -sum targets log softmax(scores)."""
    total = 0
    for row, aim in zip(scores, expected, strict=True):
        norm = sum(x.exp() for x in row).log()
        total = total - sum(a * (x - norm) for x, a in zip(row, aim, strict=True))
    return total / len(scores)


def divergence(scores, expected):
    """Mean over rows of sum p (log p - log q)."""
    total = 0
    for q, p in zip(softmax(scores), softmax(expected), strict=True):
        total = total + sum(y * (y.log() - x.log()) for x, y in zip(q, p, strict=True))
    return total / len(scores)


def mean(a, b, of=lambda x: x**2):
    apart = [x - y for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]
    return sum(map(of, apart)) / len(apart)


def two_sided(of):
    return of("image") + of("text")


def raw(measure):
    return lambda s, m, t, *_: two_sided(lambda side: measure(getattr(m, f"raw_{side}"), getattr(t[0], f"raw_{side}")))


def own_scale(loss):
    return loss.scale.log if getattr(loss.settings, "published", False) else loss.scale.log.exp()


def mixed(a, b, share):
    return [[share * x + (1 - share) * y for x, y in zip(p, q, strict=True)] for p, q in zip(a, b, strict=True)]


def aims():
    same = [[float(a == b) for b in GROUPS] for a in GROUPS]
    return [[x / sum(row) for x in row] for row in same]


def both_ways(s, measure):
    return (measure(dots(s.image, s.text, s.scale), "image") + measure(dots(s.text, s.image, s.scale), "text")) / 2


def contrastive(s, *_):
    return both_ways(s, lambda rows, _: cross_entropy(rows, aims()))


def against(measure):
    """Similarity rows of the student with those of the first teacher."""

    def reference(s, m, t, *_):
        known = {"image": dots(t[0].image, t[0].text, t[0].scale), "text": dots(t[0].text, t[0].image, t[0].scale)}
        return both_ways(s, lambda rows, side: measure(rows, known[side]))

    return reference


def ensemble(s, m, t, loss, of):
    shares = {"image": [], "text": []}
    for k, one in enumerate(t):
        scale = loss.settings.scales[k] if loss.settings.scales else one.scale
        shares["image"].append(softmax(dots(one.image, one.text, scale)))
        shares["text"].append(softmax(dots(one.text, one.image, scale)))
    return both_ways(s, lambda rows, side: cross_entropy(rows, mixed(*shares[side], 0.5)))


def crossed(measure):
    def reference(s, m, t, loss, _):
        scale, (first, *_) = own_scale(loss), t
        known = dots(first.image, first.text, first.scale)
        return (
            measure(dots(m.image, first.text, scale), known) + measure(dots(m.text, first.image, scale), turned(known))
        ) / 2

    return reference


def fused(s, m, t, loss, _):
    h = {
        side: unit(
            linear(
                [torch.stack([*u, *v]) for u, v in zip(getattr(s, side), getattr(t[0], side), strict=True)],
                loss.maps[side],
            )
        )
        for side in SIDES
    }
    rows = dots(h["image"], h["text"], own_scale(loss))
    return (cross_entropy(rows, aims()) + cross_entropy(turned(rows), aims())) / 2


def gradient(s, m, t, loss, _):
    """The analytic gradients, found by differentiating the slow contrastive loss."""

    def pulls(model):
        scale = 1 / model.scale if loss.settings.published else model.scale
        found = []
        for way in (("image", "text"), ("text", "image")):
            points = [torch.stack([torch.stack(row) for row in getattr(model, side)]) for side in way]
            points = [p if p.requires_grad else p.requires_grad_() for p in points]
            value = cross_entropy(dots(*points, scale), aims()) * (1 if loss.settings.published else PAIRS)
            found += torch.autograd.grad(value, points, create_graph=True)
        return found

    known = [g.detach() for g in pulls(t[0])]
    return sum(mean(g, k) for g, k in zip(pulls(s), known, strict=True))


def tokens(s, m, t, loss, _):
    def steady(rows):
        if not loss.settings.norm:
            return rows
        out = []
        for row in rows:
            middle = sum(row) / len(row)
            spread = (sum((x - middle) ** 2 for x in row) / len(row) + 1e-5).sqrt()
            out.append([(x - middle) / spread for x in row])
        return out

    def one(side):
        own = getattr(s, f"{side}_tokens")
        own = linear(own, loss.maps[side]) if side in loss.maps else own
        return mean(steady(own), steady(getattr(t[0], f"{side}_tokens")))

    return two_sided(one)


def kl(s, m, t, loss, _):
    heat = loss.settings.temperature
    cool = lambda rows: [[x / heat for x in row] for row in rows]  # noqa: E731
    return heat**2 * raw(lambda own, expected: divergence(cool(own), cool(expected)))(s, m, t)


def ce(s, m, t, loss, _):
    ready = softmax if loss.settings.published else list
    return raw(lambda own, expected: cross_entropy(ready(own), softmax(expected)))(s, m, t)


def labels(s, m, t, loss, of):
    known = [row for row, label in enumerate(LABELS) if label >= 0]
    rows = dots([m.image[row] for row in known], of.classes, loss.settings.scale)
    return cross_entropy(rows, [[float(LABELS[row] == k) for k in range(3)] for row in known])


def slow_ways(s, t, slow):
    scale = s.scale.detach()
    for query, slow_query, keys, teacher_query, teacher_keys in (
        (s.image, slow.image, slow.all_text, t[0].image, slow.teacher_text),
        (s.text, slow.text, slow.all_image, t[0].text, slow.teacher_image),
    ):
        yield (
            dots(query, keys, s.scale),
            softmax(dots(slow_query, keys, scale)),
            dots(teacher_query, teacher_keys, t[0].scale),
        )


def ita(s, m, t, loss, of):
    slow = of.momentum
    ways = slow_ways(s, t, slow)
    return sum(cross_entropy(rows, mixed(opinion, slow.targets, slow.alpha)) for rows, opinion, _ in ways) / 2


def upop_kd_ranking(s, m, t, loss, of):
    ways = slow_ways(s, t, of.momentum)
    return sum(cross_entropy(rows, mixed(opinion, softmax(truth), 0.3)) for rows, opinion, truth in ways) / 2


def upop_kd(s, m, t, loss, of):
    copied = sum(mean(rows, truth) for rows, _, truth in slow_ways(s, t, of.momentum))
    copied = copied + mean(s.image, t[0].image) + mean(s.text, t[0].text)
    return upop_kd_ranking(s, m, t, loss, of) + copied / 2


def soft_logits(s, m, t, loss, _):
    heat = loss.settings.temperature
    own, expected = ([[x / heat for x in row] for row in model.logits] for model in (s, t[0]))
    return heat**2 * divergence(own, expected)


def segmentation(s, m, t, loss, of):
    """Score every labelled pixel by linear interpolation between the patches around it."""

    def at(scores, row, column):
        total = 0
        for r in range(PATCHES):
            for c in range(PATCHES):
                total = total + scores[:, r, c] * weight(row, r) * weight(column, c)
        return total

    def weight(pixel, patch):
        place = min(max((pixel + 0.5) * PATCHES / PIXELS - 0.5, 0), PATCHES - 1)
        return max(0, 1 - abs(place - patch))

    losses = []
    for scores, mask in zip(s.scores, MASKS.tolist(), strict=True):
        for row, labels in enumerate(mask):
            for column, label in enumerate(labels):
                if label != 255:
                    losses.append(-softmax([list(at(scores, row, column))])[0][label].log())
    return sum(losses) / len(losses)


def language(s, m, t, loss, _):
    total, spread = 0, loss.settings.smoothing
    for weight, row, word in zip(WEIGHTS, s.logits, WORDS, strict=True):
        norm = sum(x.exp() for x in row).log()
        costs = [norm - x for x in row]
        total = total + weight * ((1 - spread) * costs[word] + spread * sum(costs) / len(costs))
    return total


def matching(s, m, t, loss, of):
    total, count = 0, 0
    for pairs, weights in zip(of.student["matches"], MATCH_WEIGHTS, strict=True):
        for place, (row, weight) in enumerate(zip(pairs, weights, strict=True)):
            total, count = total - weight * softmax([list(row)])[0][place == 0].log(), count + weight
    return total / count


REFERENCES = {
    "contrastive": contrastive,
    "affinity": against(lambda rows, known: cross_entropy(rows, softmax(known))),
    "crd": against(divergence),
    "ensemble": ensemble,
    "feature": lambda s, m, t, *_: mean(m.image, t[0].image) + mean(m.text, t[0].text),
    "masked-feature": lambda s, m, t, *_: mean(m.masked, t[0].image) + mean(m.text, t[0].text),
    "interactive": crossed(lambda rows, _: cross_entropy(rows, aims())),
    "cross": crossed(divergence),
    "gradient": gradient,
    "fused": fused,
    "tokens": tokens,
    "mse": raw(mean),
    "l1": raw(lambda own, expected: mean(own, expected, abs)),
    "huber": raw(
        lambda own, expected: mean(own, expected, lambda x: x**2 / 2 if abs(float(x.detach())) <= 1 else abs(x) - 0.5)
    ),
    "embedding-kl": kl,
    "embedding-ce": ce,
    "classification": labels,
    "logits": soft_logits,
    "segmentation": segmentation,
    "lm": language,
    "matching": matching,
    "momentum-contrastive": ita,
    "upop-kd": upop_kd,
}


def gradients(value, of, losses):
    inputs = [*of.student.values(), *losses.parameters()]
    return torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True, retain_graph=True)


@pytest.mark.parametrize(("name", "settings", "wide"), BOTH_WIDTHS)
def test_a_loss_and_its_gradients_equal_the_slow_reference(name, settings, wide):
    of, losses = world(wide), objective({name: {"weight": 2.0, **settings}}, wide)
    found, parts = losses(batch(of, losses))
    student = view(of.student)
    matched = view(of.student, losses.projections) if losses.projections else student
    expected = 2.0 * REFERENCES[name](student, matched, list(map(view, of.teachers)), losses.losses[name], of)
    assert set(parts) == {name} and expected > 0
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    slow = gradients(expected, of, losses)
    assert any(g.abs().max() > 0 for g in slow)
    for own, other in zip(gradients(found, of, losses), slow, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(("name", "settings", "wide"), BOTH_WIDTHS)
def test_the_mean_over_processes_is_the_loss_of_one(name, settings, wide):
    of, losses = world(wide), objective({name: settings}, wide)
    whole, _ = losses(batch(of, losses))
    halves = sum(losses(batch(of, losses, rows))[0] for rows in (slice(0, 3), slice(3, 6))) / 2
    torch.testing.assert_close(halves, whole, rtol=1e-12, atol=0)
    for own, other in zip(gradients(halves, of, losses), gradients(whole, of, losses), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in LOSSES
        if n not in ("classification", "logits", "lm", "segmentation")
        and "pairs" not in needs_of(terms_from((n,), "x"))
    ],
)
def test_a_frozen_tower_is_not_used(name):
    of, shares = world(wide=True), []
    for sides in (("image",), ("text",), SIDES):
        losses = objective({name: 1.0}, wide=True, sides=SIDES)
        shares.append(losses(batch(of, losses, sides=sides))[0])
    parts = sum(shares[:2]) / (2 if "keys" in losses.needs else 1)
    torch.testing.assert_close(parts, shares[2], rtol=1e-12, atol=0)


def test_every_loss_has_a_reference():
    assert REFERENCES.keys() == LOSSES.keys()


def test_logits_of_tokens_count_by_the_weights_of_the_words():
    of, losses = world(), objective(("lm", "logits"))
    _, parts = losses(batch(of, losses))
    student, heat = view(of.student), 3.0
    rows = zip(
        WEIGHTS,
        *(softmax([[x / heat for x in row] for row in one.logits]) for one in (view(of.teachers[0]), student)),
        strict=True,
    )
    wanted = sum(w * p * (p.log() - q.log()) for w, truth, found in rows for p, q in zip(truth, found, strict=True))
    torch.testing.assert_close(parts["logits"], heat**2 * wanted, rtol=1e-10, atol=0)


def test_parameters_start_alike_and_scales_stay_in_clips_range():
    first, second = (objective(("interactive", "fused", "cross"), wide=True) for _ in range(2))
    learned = dict(first.named_parameters())
    assert {"losses.interactive.scale.log", "losses.fused.maps.text.weight", "projections.image.weight"} <= set(learned)
    assert all(torch.equal(parameter, learned[name]) for name, parameter in second.named_parameters())
    assert first.losses["cross"].scale().item() == pytest.approx(1 / 0.07)
    for module in first.losses.values():
        module.scale.log.data.fill_(9.0)
    first.clamp_scales()
    assert {module.scale.log.item() for module in first.losses.values()} == {MAX_LOG_SCALE}


def test_the_scale_as_published_lacks_its_exp():
    for name in ("interactive", "fused"):
        assert objective({name: {"published": True}}).losses[name].scale().item() == pytest.approx(2.659, abs=1e-3)


def test_guided_upop_only_ranks_on_the_steps_that_move_the_masks():
    of, losses = world(), objective(("upop-kd",))
    moving, _ = losses(replace(batch(of, losses), masks_move=True))
    student, teachers = view(of.student), list(map(view, of.teachers))
    torch.testing.assert_close(moving, upop_kd_ranking(student, student, teachers, None, of), rtol=1e-10, atol=0)
    assert losses(batch(of, losses))[0] > moving


def test_crd_pulls_like_affinity_and_ends_at_zero():
    of, losses = world(), objective(("crd", "affinity"))
    _, parts = losses(batch(of, losses))
    for own, other in zip(*(gradients(part, of, losses) for part in parts.values()), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-11)
    assert parts["crd"] < parts["affinity"]
    caught_up = batch(of, losses)
    _, parts = losses(replace(caught_up, student=caught_up.teacher))
    assert parts["crd"].item() == pytest.approx(0, abs=1e-12) and parts["affinity"] > 0


def test_gradients_of_the_right_temperature_do_not_vanish_as_the_published_ones_do():
    of = world()
    sizes = []
    for published in (False, True):
        losses = objective({"gradient": {"published": published, "weight": 1.0}})
        sizes.append(losses(batch(of, losses))[0].item())
    assert sizes[1] < 1e-3 * sizes[0]


def hidden(ratio, rows=slice(None), images=8):
    losses = objective({"masked-feature": {"ratio": ratio, "patch": 8}})
    values = torch.rand(images, 16, generator=torch.Generator().manual_seed(0))
    return losses.mask_patches(torch.ones(images, 3, 32, 32)[rows], lambda patches: values[rows, :patches])


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.75, 1.0])
def test_exactly_the_given_ratio_of_patches_is_masked(ratio):
    squares = hidden(ratio).unfold(2, 8, 8).unfold(3, 8, 8).flatten(4)  # [B, 3, 4, 4, 64]
    assert torch.equal(squares.amin(-1), squares.amax(-1)) and torch.equal(squares[:, 0], squares[:, 2])
    assert ((squares[:, 0, :, :, 0] == 0).flatten(1).sum(1) == round(ratio * 16)).all()
    if 0 < ratio < 1:
        assert len(torch.unique(hidden(ratio).flatten(1), dim=0)) > 1


def test_an_image_gets_the_same_mask_on_any_process():
    assert torch.equal(hidden(0.75, slice(1, None, 2)), hidden(0.75)[1::2])


def test_masked_feature_uses_the_masked_image():
    of, losses = world(), objective({"masked-feature": 1.0, "feature": 1.0})
    seen = batch(of, losses)
    _, parts = losses(seen)
    assert abs(parts["masked-feature"] - parts["feature"]) > 1e-3
    _, parts = losses(replace(seen, student=replace(seen.student, masked_image=seen.student.image)))
    torch.testing.assert_close(parts["masked-feature"], parts["feature"])


def test_a_batch_without_labels_has_zero_loss_and_can_be_differentiated():
    of, losses = world(wide=True), objective(("classification",), wide=True)
    none = torch.full_like(LABELS, -1)
    found, _ = losses(replace(batch(of, losses), labels=none, all_labels=none))
    assert found.item() == 0
    assert all(
        (g == 0).all()
        for g in torch.autograd.grad(found, [of.student["image"], *losses.projections["image"].parameters()])
    )


def test_absent_terms_are_not_computed(monkeypatch):
    from clipress.compress.losses.feature import Feature

    def never(self, batch):
        raise AssertionError("computed though absent")

    monkeypatch.setattr(Feature, "forward", never)
    of = world()
    for names in (("contrastive",), ("feature",)):
        losses = objective(names)
        if names == ("feature",):
            with pytest.raises(AssertionError, match="though absent"):
                losses(batch(of, losses))
        else:
            losses(batch(of, losses))


def test_names_without_weights_get_the_published_weights():
    terms = terms_from(("contrastive", "feature", "embedding-kl", "l1", "embedding-ce"), "x")
    weights = {name: settings.weight for name, settings in terms.items()}
    assert weights == {"contrastive": 1.0, "feature": 2000.0, "embedding-kl": 0.6, "l1": 0.35, "embedding-ce": 0.05}
    assert terms_from({"feature": 3}, "x")["feature"].weight == 3.0
    assert terms_from({"gradient": {"published": True}}, "x")["gradient"].weight == 1e8
    assert terms_from({"gradient": {"published": True, "weight": 2}}, "x")["gradient"].weight == 2
    assert "teacher" in needs_of(terms) and "teacher" not in needs_of(
        terms_from(("contrastive", "momentum-contrastive"), "x")
    )
    assert "momentum" in needs_of(terms_from(("momentum-contrastive",), "x"))
    with pytest.raises(RecipeError, match="Did you mean 'affinity'"):
        terms_from(("afinity",), "x")
    with pytest.raises(RecipeError, match=r"unknown key 'wieght'\. Did you mean 'weight'"):
        terms_from({"feature": {"wieght": 1}}, "x")


@pytest.mark.parametrize(
    ("term", "sizes", "message"),
    [
        ({"tokens": {}}, {"teacher_tokens": dict.fromkeys(SIDES, (5, 3))}, r"tower as in the teacher's \(5\), found 3"),
        ({"ensemble": {"scales": [1.0]}}, {}, r"expected one of .scales. per teacher \(2\), found 1"),
        ({"classification": {}}, {"sides": ("text",)}, "expected a trained image tower, found it frozen"),
        ({"masked-feature": {"patch": 12}}, {}, "expected a divisor of the image size 32x32, found 12"),
    ],
)
def test_a_loss_that_cannot_work_is_rejected_before_training(term, sizes, message):
    shapes = dict.fromkeys(SIDES, (3, 3))
    known = Sizes(WIDTH, (WIDTH, WIDTH + 3), SIDES, (32, 32), shapes, shapes)
    with pytest.raises(RecipeError, match=message):
        Objective(terms_from(term, "x"), replace(known, **sizes))
