"""BLIP's four models: their towers, parts and sizes, and that a cut one computes what the masked one does."""

import copy

import pytest
import torch
from blip_reference import EMBED, PATCH, POSITIONS, SIZE, TASKS, VOCABULARY, inputs, pixels, texts

from clipress.compress.prune.criterion import CRITERIA, Accumulator
from clipress.compress.prune.gates import Gates, sites
from clipress.compress.prune.rotate import rotate
from clipress.errors import ArtifactError
from clipress.models import anatomy, blip, surgery
from clipress.models.blip import SMOOTHING
from clipress.models.owners import owned

IMAGE = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": 48, "depth": 1, "num_heads": 2}
TEXT = {"vocabulary": VOCABULARY, "width": 32, "layers": 2, "heads": 2, "positions": POSITIONS}
MORE = {"retrieval": {"embed_dim": EMBED}, "nlvr": {"merges_from": 1}, "caption": {}, "vqa": {"answer_length": 6}}
TOKENS = (SIZE // PATCH) ** 2 + 1


def architecture(task, **change):
    return {"task": task, "image": IMAGE, "text": TEXT, "context_length": 7, **MORE[task], **change}


def model_of(task):
    made = blip.build(architecture(task), 0).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made


def outputs(model, task, arrays=None):
    with torch.no_grad():
        found = model(*(inputs(task) if arrays is None else arrays))
    return found if isinstance(found, tuple) else (found,)


def assert_same(found, wanted, atol=1e-5):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=1e-5)


def test_towers_and_parts():
    for task in TASKS:
        model = model_of(task)
        wanted = ("image", "question", "answer") if task == "vqa" else ("image", "text")
        assert anatomy.towers(model) == wanted
        owned_by = [anatomy.tower_of(model, name) for name, _ in model.named_parameters()]
        assert owned_by.count(None) == (task == "retrieval") and set(owned_by) - {None} == set(wanted)
        assert anatomy.image_size(model) == (SIZE, SIZE) and not list(anatomy.stock_attentions(model))
    found = [(part.tower, part.name, part.tokens) for part in anatomy.parts(model_of("nlvr"))]
    text = [
        ("text", f"text_encoder.layers.{i}{path}", 7)
        for i in range(2)
        for path in (".attn", ".cross.0", ".cross.1", "")
    ]
    image = [("image", f"visual_encoder.blocks.0.{path}", TOKENS) for path in ("attn", "mlp")]
    assert found == image + text
    parts = {part.name: part for part in anatomy.attentions(model_of("vqa"))}
    memories = {name: (part.tokens, part.memory, part.memory_width) for name, part in parts.items()}
    assert memories["text_encoder.layers.1.attn"] == (7, 7, 32)
    assert memories["text_encoder.layers.1.cross.0"] == (7, TOKENS, 48)
    assert memories["text_decoder.layers.1.attn"] == (6, 6, 32)
    assert memories["text_decoder.layers.1.cross.0"] == (6, 7, 32)
    heads = blip.build(architecture("retrieval"))
    assert anatomy.projection(heads, "image") is heads.vision_proj
    assert anatomy.projection(heads, "text") is heads.text_proj
    assert anatomy.projection(model_of("nlvr"), "text") is None


def test_what_a_text_module_writes_is_normalised():
    found = {block.tower: block.is_residual for block in anatomy.blocks(model_of("caption"))}
    assert found == {"image": True, "text": False}


def randomly_masked(gates):
    generator = torch.Generator().manual_seed(0)
    for site in gates.sites:
        order = torch.rand(site.groups, site.units, generator=generator).argsort(1)
        site.mask = (order < site.units // 2).float()


KINDS = [("separate", kind) for kind in ("qk", "v", "ffn", "heads", "qk v ffn")]
KINDS += [("upop", kind) for kind in ("qk", "ffn", "qk v ffn")]


@pytest.mark.parametrize(("space", "kinds"), KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_masked_by_gates_equals_cut(task, space, kinds):
    model = model_of(task)
    whole = outputs(model, task)
    gates = Gates(model, space, dict.fromkeys(anatomy.towers(model), kinds.split()))
    assert {site.part.tower for site in gates.sites} == set(anatomy.towers(model))
    randomly_masked(gates)
    masked, masks = outputs(model, task), gates.part_masks()
    gates.remove()
    for part, mask in masks:
        surgery.cut(part, mask)
    assert_same(outputs(model, task), masked)
    assert all(float((a - b).abs().max()) > 1e-3 for a, b in zip(masked[-1:], whole[-1:], strict=True))
    again = surgery.reshape(blip.build(architecture(task)), surgery.shapes(model)).eval()
    again.load_state_dict(model.state_dict())
    assert_same(outputs(again, task), outputs(model, task), atol=0)


@pytest.mark.parametrize("space", ["separate", "upop"])
def test_what_an_image_s_steps_share_is_masked_and_cut_too(space):
    model, (ids, mask) = model_of("caption"), texts()
    gates = Gates(model, space)
    randomly_masked(gates)
    with torch.no_grad():
        masked = model.decode(ids, mask, model.memory(model.image(pixels())))
        assert_same(outputs(model, "caption"), (masked,))
        for part, mask_of in gates.part_masks():
            surgery.cut(part, mask_of)
        gates.remove()
        found = model.decode(ids, mask, model.memory(model.image(pixels())))
    torch.testing.assert_close(found, masked, atol=1e-5, rtol=1e-5)


def test_a_part_without_units_leaves_its_bias():
    model = model_of("nlvr")
    cut = copy.deepcopy(model)
    for part, other in zip(anatomy.attentions(model), anatomy.attentions(cut), strict=True):
        part.module.out.weight.data.zero_()
        surgery.cut(other, surgery.AttnMask(heads=torch.zeros(2, dtype=torch.bool)))
    assert_same(outputs(cut, "nlvr"), outputs(model, "nlvr"))


@pytest.mark.parametrize("task", TASKS)
def test_costs_are_what_cutting_saves(task):
    """Multiply-accumulates of one sample where every tower runs once, which it does for captions and answers."""
    whole = model_of(task)
    for index, site in enumerate(sites(whole, "separate")):
        model = copy.deepcopy(whole)
        gates = Gates(model, "separate")
        gates.sites[index].mask[:, -3:] = 0
        masks = gates.part_masks()
        gates.remove()
        for part, mask in masks:
            surgery.cut(part, mask)
        saved = anatomy.counts(whole)["params"] - anatomy.counts(model)["params"]
        assert saved == 3 * site.params, site.name
        if task in ("caption", "vqa"):
            assert macs(whole, task) - macs(model, task) == 3 * site.macs, site.name


def macs(model, task):
    """Count one sample, whose texts are as long as the model's costs assume."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    arrays = [rows[:1] for rows in inputs(task)]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*arrays)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("task", TASKS)
def test_turned_heads_compute_the_same(task):
    model = model_of(task)
    before = outputs(model, task)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rotate(anatomy.attentions(model), lambda: outputs(model, task))
    assert_same(outputs(model, task), before, atol=1e-4)
    for part in anatomy.attentions(model):
        for name in ("q", "k", "v", "out"):
            assert not torch.equal(
                model.state_dict()[f"{part.name}.{name}.weight"], weights[f"{part.name}.{name}.weight"]
            )


def sample(task, number):
    """Return the inputs of one sample alone."""
    arrays = inputs(task)
    if task == "nlvr":
        return arrays[0][number::2], *(rows[number : number + 1] for rows in arrays[1:])
    if task != "vqa":
        return tuple(rows[number : number + 1] for rows in arrays)
    own = arrays[5] == number
    alone = [rows[number : number + 1] for rows in arrays[:3]] + [rows[own] for rows in arrays[3:5]]
    return *alone, torch.zeros(int(own.sum()), dtype=torch.int64)


def loss_of(outputs):
    found = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum(rows.pow(3).sum() for rows in found)


@pytest.mark.parametrize("space", ["separate", "upop"])
@pytest.mark.parametrize("task", TASKS)
def test_a_gates_gradient_of_a_sample_is_that_of_the_sample_alone(task, space):
    """Images in pairs, and answers in other numbers than questions; every gate sees each sample by itself."""
    model = model_of(task)
    gates = Gates(model, space)
    loss_of(model(*inputs(task))).backward()
    found = {site.name: site.gradient() for site in gates.sites}
    assert all(len(rows) == 2 for rows in found.values())
    gates.clear()
    for number in range(2):
        loss_of(model(*sample(task, number))).backward()
        for site in gates.sites:
            scale = float(site.gradient().abs().max())
            assert scale > 0
            torch.testing.assert_close(found[site.name][number], site.gradient()[0], atol=1e-4 * scale, rtol=1e-4)
        gates.clear()


@pytest.mark.parametrize("task", ["nlvr", "caption", "vqa"])
def test_squared_gradients_of_weights_are_those_of_samples_whose_rows_add_up(task):
    model = model_of(task)
    squares = copy.deepcopy(model)
    for parameter in squares.parameters():
        parameter.data.zero_()
    for number in range(2):
        model.zero_grad()
        loss_of(model(*sample(task, number))).backward()
        for total, weight in zip(squares.parameters(), model.parameters(), strict=True):
            total.data += 0 if weight.grad is None else (weight.grad * weight.data).square()
    gates = Gates(model, "separate")
    seen = Accumulator(CRITERIA["hessian"](), gates.sites)
    loss_of(model(*inputs(task))).backward()
    seen.add()
    for site, score in zip(sites(squares, "separate"), seen.scores(lambda total: total), strict=True):
        wanted = sum(rows.sum(2) for rows in site.sides()).detach().double()
        torch.testing.assert_close(score, wanted, rtol=1e-3, atol=1e-5 * float(wanted.max()))


def test_rows_of_a_sample_in_any_order_and_several_calls_add_up():
    model, (ids, mask) = model_of("retrieval"), texts(4)
    gates = Gates(model, "upop", {"text": ("qk", "v", "ffn"), "image": ()})
    states = torch.randn(4, TOKENS, 48, generator=torch.Generator().manual_seed(6))
    rows = torch.tensor([1, 0, 1, 1])
    with owned(rows, 2):
        loss = model.match(ids, mask, states).pow(3).sum()
    (loss + model.text_embeds(ids[:2], mask[:2]).pow(3).sum()).backward()
    found = [site.gradient() for site in gates.sites]
    gates.clear()
    for number in range(2):
        own = rows == number
        one = slice(number, number + 1)
        alone = model.text_embeds(ids[one], mask[one]).pow(3).sum()
        with owned(torch.zeros(int(own.sum()), dtype=torch.int64), 1):
            alone = alone + model.match(ids[own], mask[own], states[own]).pow(3).sum()
        alone.backward()
        for site, gradient in zip(gates.sites, found, strict=True):
            torch.testing.assert_close(gradient[number], site.gradient()[0], atol=1e-4, rtol=1e-4)
        gates.clear()
    with owned(rows, 2), pytest.raises(ValueError, match="expected 4 rows, whose owners are known, found 3"):
        model.text_embeds(ids[:3], mask[:3])


@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_model_s_gates_know_the_owners_too(recompute):
    model = model_of("nlvr")
    gates = Gates(model, "separate")
    loss_of(model(*inputs("nlvr"))).backward()
    wanted = [site.gradient() for site in gates.sites]
    gates.clear()
    model.set_grad_checkpointing(recompute)
    model.compile(dynamic=False, backend="aot_eager", fullgraph=True)
    loss_of(model(*inputs("nlvr"))).backward()
    for site, gradient in zip(gates.sites, wanted, strict=True):
        torch.testing.assert_close(site.gradient(), gradient, atol=1e-4, rtol=1e-4)


def test_answers_are_scored_by_their_smoothed_log_probabilities():
    model, arrays = model_of("vqa"), inputs("vqa")
    images, ids, mask, answers, answers_mask, owners = arrays
    with torch.no_grad():
        states = model.question(ids, mask, model.image(images))[owners]
        found = model.answer(answers, answers_mask, states, mask[owners])
        logits = model(*arrays)
    targets = answers[:, 1:].masked_fill(answers_mask[:, 1:] == 0, -100)
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].mT, targets, reduction="none", label_smoothing=SMOOTHING, ignore_index=-100
    )
    torch.testing.assert_close(found, -loss, atol=1e-5, rtol=1e-5)


BASE_IMAGE = {"img_size": 384, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
BASE_TEXT = {"vocabulary": 30524, "width": 768, "layers": 12, "heads": 12, "positions": 512}
LARGE = {"image": BASE_IMAGE, "text": BASE_TEXT, "context_length": 35}


@pytest.mark.parametrize(
    ("task", "change", "millions"),
    [
        ("retrieval", {"embed_dim": 256}, 223.7),
        ("nlvr", {"merges_from": 6}, 259.37),
        ("caption", {}, 223.97),
        ("vqa", {"image": {**BASE_IMAGE, "img_size": 480}, "answer_length": 16}, 361.48),
    ],
)
def test_blip_base_has_the_published_size(task, change, millions):
    with torch.device("meta"):
        model = blip.build(architecture(task, **{**LARGE, **change}))
    counts = anatomy.counts(model)
    assert round(counts["params"] / 1e6, 1 if task == "retrieval" else 2) == millions
    words = (30524 + 512) * 768 * (2 if task == "vqa" else 1)
    grid = (change.get("image", BASE_IMAGE)["img_size"] // 16) ** 2
    assert counts["params"] - counts["params_without_embeddings"] == words + (grid + 2) * 768
    assert counts["block_params"] < counts["params_without_embeddings"]


@pytest.mark.parametrize(
    "change",
    [
        {"task": "answer"}, {"image": {**IMAGE, "depth": 10**6}}, {"image": {"depth": 1}}, {"text": {**TEXT, "drop": 1}},
        {"text": {**TEXT, "layers": "2"}}, {"text": {**TEXT, "heads": 3}}, {"text": None}, {"answer_length": 0},
        {"context_length": POSITIONS + 1}, {"text": {**TEXT, "width": 10**9}}, {"answer_length": None},
    ],
)  # fmt: skip
def test_an_absurd_architecture_is_refused(change):
    with pytest.raises(ArtifactError, match="architecture"):
        blip.build(architecture("vqa") | change)
