"""Every form of a recipe's student section gives a CLIP that trains, round-trips and exports."""

import json
from dataclasses import replace

import open_clip
import pytest
import timm
import torch
import torchvision

from clipress.artifact import load_artifact, save_artifact
from clipress.compress.pipeline import compress
from clipress.compress.plan import compress_plan_from
from clipress.data.eval_sets import evalsets
from clipress.data.spec import SourceSpec
from clipress.data.transforms import Preprocess
from clipress.errors import ArtifactError, RecipeError
from clipress.export.settings import OnnxSettings
from clipress.export.to_onnx import onnx_from_artifact
from clipress.models import anatomy, surgery
from clipress.models.load import Model, artifact_from_model, new_model, save_for_open_clip
from clipress.models.named_towers import IMAGE_TOWERS, TEXT_TOWERS
from clipress.models.students import (
    check,
    eval_frozen_modules,
    freeze,
    start_hash,
    student_from,
    towers_of_teacher,
)
from clipress.models.tiny import tiny_architecture
from clipress.recipe import Recipe
from clipress.tasks import model_from_artifact

TEXT = {"context_length": 16, "vocab_size": 500, "width": 32, "heads": 2, "layers": 1}
# The smallest size, in whole patches and windows, that each tower accepts.
SIZES = {"mobilevit-s": 64, "swin-t": 64, "resnet-50": 64, "clip-distill": 64}
SAMPLE = [SourceSpec(format="scenes", split="test", limit=10)]


def student(image, text=TEXT, teacher=None, seed=0, **more):
    return student_from({"image": image, "text": text, **more}, teacher, seed)


def named(image):
    return student(image, embed_dim=32, image_size=SIZES.get(image, 32))


def inputs(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 400, (3, model.tokenizer["context_length"]), generator=generator)
    ids[:, -1] = int(model.module.vocab_size) - 1
    return torch.randn(3, 3, model.preprocess.size, model.preprocess.size, generator=generator), ids


def loss(model):
    """Return a number that depends on every trained weight."""
    pixels, ids = inputs(model)
    module = model.module
    return module.encode_image(pixels).sum() + module.encode_text(ids).sum() + module.logit_scale.exp()


@torch.no_grad()
def outputs(model):
    pixels, ids = inputs(model)
    module = model.module.eval()
    return module.encode_image(pixels), module.encode_text(ids)


def teacher_clip(custom_text=False, cut=False, seed=5, **changes):
    """Return a teacher with non-default preprocessing, tokenizer length and logit scale."""
    made = tiny_architecture() | {"custom_text": custom_text, "quick_gelu": True}
    model = new_model(made | changes, seed)
    torch.manual_seed(seed)
    for parameter in model.module.parameters():  # Biases start at zero and gains at one, so randomise them.
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.8, 0.4)
    torch.nn.init.constant_(model.module.logit_scale, 3.0)
    if cut:
        half = torch.arange(16).expand(2, 16) < 8
        for attn, ffn in (block.parts for block in anatomy.blocks(model.module)):
            surgery.cut(attn, surgery.AttnMask(half, half))
            surgery.cut(ffn, surgery.FfnMask(torch.arange(128) % 2 == 0))
    preprocess = Preprocess(size=32, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), resize_mode="squash")
    return Model(model.module.eval(), model.architecture, preprocess, model.tokenizer)


def assert_comes_back_bitwise(model, folder):
    save_artifact(artifact_from_model(model, ({"stage": "x", "hash": "abc"},), {}), folder)
    again = model_from_artifact(load_artifact(folder))
    for wanted, found in zip(outputs(model), outputs(again), strict=True):
        assert torch.equal(found, wanted)
    assert (again.preprocess, again.tokenizer) == (model.preprocess, model.tokenizer)


@pytest.mark.parametrize("image", IMAGE_TOWERS)
def test_every_named_image_tower_trains_all_weights_and_round_trips_bitwise(image, tmp_path):
    model = named(image)
    model.module.train()
    loss(model).backward()
    unused = [name for name, p in model.module.named_parameters() if p.grad is None]
    assert not unused  # DDP would wait for them forever.
    assert outputs(model)[0].shape == (3, 32) and outputs(model)[1].shape == (3, 32)
    assert_comes_back_bitwise(model, tmp_path / "a")


@pytest.mark.parametrize("text", TEXT_TOWERS)
def test_every_named_text_tower_trains_all_weights_and_round_trips_bitwise(text, tmp_path):
    teacher = teacher_clip(text_cfg={**TEXT, "context_length": 77})  # Its vocabulary is small.
    model = student("vit-1x32-p16", text, teacher)
    loss(model).backward()
    assert all(p.grad is not None for p in model.module.parameters())
    assert outputs(model)[1].shape == (3, 32)
    assert_comes_back_bitwise(model, tmp_path / "a")


@pytest.mark.parametrize(
    "image", ["resnet-18", "mobilevit-s", "vit-t-16", pytest.param("swin-t", marks=pytest.mark.slow)]
)
def test_students_of_every_family_export_and_match_torch(image, tmp_path):
    text = {**TEXT, "vocab_size": 49408}
    model = student(image, text, embed_dim=32, image_size=SIZES.get(image, 32))
    folder = save_artifact(artifact_from_model(model, ({"stage": "x", "hash": "abc"},), {}), tmp_path / "a")
    settings = OnnxSettings(exporter="torchscript")
    made = onnx_from_artifact(folder, tmp_path / "e", settings, evalsets(SAMPLE))
    assert made.least_cosines["image"] > 0.9999


def test_batch_norm_statistics_are_updated_in_training_and_used_in_evaluation():
    model = named("resnet-18")
    pixels, _ = inputs(model)
    (norm, *_) = [m for m in model.module.visual.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    before, fixed = norm.running_mean.clone(), outputs(model)[0]
    model.module.train().encode_image(pixels)
    assert not torch.equal(norm.running_mean, before)
    with torch.no_grad():
        alone = model.module.eval().encode_image(pixels[:1])
    torch.testing.assert_close(alone, outputs(model)[0][:1])  # Other images in the batch no longer matter.
    assert not torch.allclose(alone, fixed[:1])


@pytest.mark.parametrize(
    ("towers", "config"), [(IMAGE_TOWERS, {"width": 64, "layers": 1, "patch_size": 16}), (TEXT_TOWERS, TEXT)]
)
def test_a_registered_tower_can_be_named_in_a_recipe(towers, config):
    section = {"image": "vit-1x32-p16", "text": "1x32", "image_size": 32, towers.kind.split()[0]: "tiny-test"}
    with towers.registered("tiny-test", config):
        made = student_from(section, None, 0)
    widths = {part.tower: part.width for part in anatomy.attentions(made.module)}
    assert widths[towers.kind.split()[0]] == config["width"]


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_named_towers_match_the_published_ones():
    d, tokens = 192, 1 + (32 // 16) ** 2
    block = 2 * 2 * d + (4 * d * d + 4 * d) + (8 * d * d + 5 * d)  # norms, attention, feed-forward
    ends = d * 3 * 16 * 16 + d + tokens * d + 2 * 2 * d + d * 32  # Patches, class token, positions, norms, projection.
    assert parameters(named("vit-t-16").module.visual) == 12 * block + ends
    resnet = torchvision.models.resnet18()
    assert parameters(named("resnet-18").module.visual) == parameters(resnet) - parameters(resnet.fc) + 512 * 32
    mobilenet = torchvision.models.mobilenet_v3_small(num_classes=32)
    assert parameters(named("mobilenetv3-s").module.visual) == parameters(mobilenet)
    swin = torchvision.models.swin_t()
    # timm's head has no bias here.
    assert (
        parameters(student("swin-t", embed_dim=32).module.visual) == parameters(swin) - parameters(swin.head) + 768 * 32
    )
    rn50 = open_clip.get_model_config("RN50")["vision_cfg"]
    assert IMAGE_TOWERS["resnet-50"].items() <= rn50.items()
    parts = anatomy.attentions(student("clip-distill", "clip-distill").module)
    heads = {part.tower: (part.module.heads, part.module.qk_dim) for part in parts}
    assert heads == {"image": (24, 24), "text": (8, 16)}
    assert TEXT_TOWERS["clip-kd"] == {"width": 384, "heads": 6, "layers": 12}


@pytest.mark.parametrize(
    ("image", "text", "wanted"),
    [
        ("vit-3x192-p16", "2x384", {"image": [(192, 3, 64)] * 3, "text": [(384, 6, 64)] * 2}),
        ("vit-1x96-p8", "1x32", {"image": [(96, 3, 32)], "text": [(32, 1, 32)]}),
    ],
)
def test_a_short_size_spells_layers_width_and_patch(image, text, wanted):
    model = student(image, text, image_size=32)
    found = {"image": [], "text": []}
    for part in anatomy.attentions(model.module):
        found[part.tower].append((part.width, part.module.heads, part.module.qk_dim))
    assert found == wanted
    assert model.tokenizer == {"name": "clip-bpe", "context_length": 77, "kwargs": {}}
    assert model.module.vocab_size == 49408 and model.architecture["embed_dim"] == 512
    patch = int(image.rpartition("p")[2])
    assert model.module.visual.conv1.weight.shape[-1] == patch


def test_any_timm_tower_is_built_at_the_required_size(tmp_path):
    for name, size in (("test_efficientnet", 48), ("vit_tiny_patch16_224", 64)):
        model = student({"timm": name}, embed_dim=24, image_size=size)
        assert outputs(model)[0].shape == (3, 24)
        assert_comes_back_bitwise(model, tmp_path / name)
        assert model.architecture["vision_cfg"]["timm_model_pretrained"] is False


def test_a_resized_timm_tower_is_not_written_for_open_clip(tmp_path):
    """open_clip would build it at the size of its name and reject its position embeddings."""
    assert not save_for_open_clip(student({"timm": "test_vit"}, image_size=64), tmp_path / "resized")
    assert save_for_open_clip(student({"timm": "test_vit"}, image_size=160), tmp_path / "as-published")
    stock = open_clip.create_model(f"local-dir:{tmp_path / 'as-published'}", require_pretrained=True)
    assert stock.visual.image_size == (160, 160)


@pytest.mark.parametrize(
    "wrap", [lambda state: state, lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}}]
)
@pytest.mark.parametrize(("timm_name", "more"), [("resnet10t", {}), ("test_vit", {"timm_pool": "token"})])
def test_a_timm_file_gives_a_tower_its_weights(timm_name, more, wrap, tmp_path):
    torch.manual_seed(3)
    stock = timm.create_model(timm_name, num_classes=10, **({"img_size": 32} if "vit" in timm_name else {})).eval()
    torch.save(wrap(stock.state_dict()), tmp_path / "tower.pth")
    section = {"image": {"timm": timm_name, "checkpoint": str(tmp_path / "tower.pth"), **more}, "text": TEXT}
    trunk = student_from({**section, "image_size": 32}, None, 0).module.visual.trunk.eval()
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(trunk.forward_features(pixels), stock.forward_features(pixels))
    before = start_hash(section, 0)
    torch.save({**stock.state_dict(), "more": torch.ones(1)}, tmp_path / "tower.pth")
    assert start_hash(section, 0) != before
    with pytest.raises(ArtifactError, match=r"tower\.pth: 1 tensors have no place in its timm model: more"):
        student_from({**section, "image_size": 32}, None, 0)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (None, "does not exist"),
        ({"conv1.weight": torch.ones(3)}, r"expected conv1\.\S+ .* by its timm model, found"),
    ],
)
def test_a_timm_file_that_does_not_fit_is_named(file, message, tmp_path):
    if file:
        torch.save(file, tmp_path / "tower.pth")
    section = {"image": {"timm": "resnet10t", "checkpoint": str(tmp_path / "tower.pth")}, "text": TEXT}
    with pytest.raises(ArtifactError, match=message):
        student_from(section, None, 0)
    with pytest.raises(RecipeError, match="expected pretrained or checkpoint, found both"):
        student_from({**section, "image": {**section["image"], "pretrained": True}}, None, 0)


def test_timm_weights_are_fetched_once_and_not_again_on_loading(monkeypatch):
    """A fake builder fills the tower with a known number instead of downloading."""
    import open_clip.timm_model as timm_model

    requested, real = [], timm_model.timm.create_model

    def create_model(*args, pretrained=False, **kwargs):
        requested.append(pretrained)
        made = real(*args, **kwargs)
        if pretrained:
            torch.nn.init.constant_(made.conv1[0].weight, 0.25)
        return made

    monkeypatch.setattr(timm_model.timm, "create_model", create_model)
    model = student({"timm": "test_resnet", "pretrained": True}, embed_dim=16, image_size=32)
    assert requested == [True] and bool((model.module.visual.trunk.conv1[0].weight == 0.25).all())
    again = model_from_artifact(artifact_from_model(model, (), {}))
    assert requested[0] and not any(requested[1:]) and torch.equal(outputs(again)[0], outputs(model)[0])


def test_unavailable_timm_weights_are_reported(monkeypatch):
    def fails(*_, **__):
        raise OSError("no route to the hub")

    monkeypatch.setattr("open_clip.timm_model.timm.create_model", fails)
    with pytest.raises(RecipeError, match=r"test_resnet cannot be loaded: no route.*Leave out 'pretrained'"):
        student({"timm": "test_resnet", "pretrained": True})


def test_the_seed_decides_the_weights():
    first, same, other = (student("resnet-18", image_size=32, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(outputs(first)[0], outputs(same)[0])
    assert not torch.equal(outputs(first)[0], outputs(other)[0])


def test_a_full_open_clip_config_works_and_uses_the_teachers_preprocessing():
    config = tiny_architecture(width=16)
    wanted = new_model(config, 3)
    alone, taught = student_from(config, None, 3), student_from(config, teacher_clip(), 3)
    for model in (alone, taught):
        assert all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(wanted), strict=True))
    assert alone.preprocess == wanted.preprocess and taught.preprocess == teacher_clip().preprocess


@pytest.fixture
def tiny_name(tmp_path):
    (tmp_path / "tiny-student.json").write_text(json.dumps(tiny_architecture(width=16, image_size=64)))
    open_clip.add_model_config(tmp_path / "tiny-student.json")
    return "tiny-student"


def test_an_open_clip_name_has_random_weights_and_the_teachers_sizes(tiny_name):
    model = student_from({"model": tiny_name}, teacher_clip(), 7)
    assert model.preprocess == teacher_clip().preprocess and outputs(model)[0].shape == (3, 32)
    again = student_from({"model": tiny_name}, teacher_clip(), 7)
    assert torch.equal(outputs(model)[0], outputs(again)[0])
    alone = student_from({"model": tiny_name, "embed_dim": 48}, None, 7)
    assert alone.preprocess.size == 64 and outputs(alone)[1].shape == (3, 48)


@pytest.mark.parametrize("size", [16, 64])
def test_a_student_may_have_another_image_size_than_its_teacher(tiny_name, size):
    teacher = replace(teacher_clip(), preprocess=Preprocess(size=32, mean=(0.1, 0.1, 0.1)))
    for section in ({"model": tiny_name}, {"image": {"width": 64, "layers": 1, "patch_size": 8}, "text": "1x32"}):
        model = student_from({**section, "image_size": size}, teacher, 0)
        assert model.preprocess == Preprocess(size=size, mean=(0.1, 0.1, 0.1))
        assert model.module.encode_image(torch.zeros(1, 3, size, size)).shape == (1, 32)


def test_a_checkpoint_gives_an_open_clip_name_its_weights(tiny_name, tmp_path):
    torch.manual_seed(1)
    stock = open_clip.create_model(tiny_name).eval()
    torch.save(stock.state_dict(), tmp_path / "weights.pt")
    section = {"model": tiny_name, "checkpoint": str(tmp_path / "weights.pt")}
    model = student_from(section, None, 0)
    with torch.no_grad():
        torch.testing.assert_close(outputs(model)[0], stock.encode_image(inputs(model)[0]), atol=1e-5, rtol=1e-5)
    other = replace(teacher_clip(), preprocess=Preprocess(size=32, mean=(0.1, 0.1, 0.1)))
    assert student_from(section, other, 0).preprocess == model.preprocess  # which its weights were trained with
    before = start_hash(section, 0)
    assert start_hash(section, 0) == before != start_hash(section, 1)
    torch.save({}, tmp_path / "weights.pt")
    assert start_hash(section, 0) != before  # Other weights under the same name are a different start.


def test_a_new_text_tower_uses_the_teachers_tokenizer():
    teacher = teacher_clip()
    teacher.architecture["text_cfg"]["pool_type"] = "last"
    model = student("resnet-18", "1x32", teacher)
    assert model.tokenizer == teacher.tokenizer and model.preprocess == teacher.preprocess
    assert model.architecture["text_cfg"]["pool_type"] == "last" and model.architecture["embed_dim"] == 32


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("tower", anatomy.TOWERS)
def test_a_whole_tower_is_copied_from_the_teacher(tower, custom_text, cut, tmp_path):
    teacher = teacher_clip(custom_text, cut)
    section = {"image": {"timm": "test_resnet"}, "text": "1x32"} | {tower: "teacher"}
    model = student_from(section, teacher, 0)
    number = anatomy.TOWERS.index(tower)
    assert towers_of_teacher(section) == (tower,)
    assert torch.equal(outputs(model)[number], outputs(teacher)[number])
    assert not torch.equal(outputs(model)[1 - number], outputs(teacher)[1 - number])
    assert model.module.logit_scale.item() == 3.0 and model.preprocess == teacher.preprocess
    with torch.no_grad():  # The tower is a copy: the teacher keeps its weights.
        for parameter in model.module.parameters():
            parameter.zero_()
    assert outputs(teacher)[number].abs().sum() > 0
    assert_comes_back_bitwise(student_from(section, teacher, 0), tmp_path / "a")


def test_frozen_towers_update_neither_weights_nor_statistics():
    teacher = teacher_clip(vision_cfg={"timm_model_name": "test_resnet", "timm_proj": "linear", "image_size": 32})
    section = {"image": "teacher", "text": "1x32"}
    model = student_from(section, teacher, 0)
    freeze(model.module, towers_of_teacher(section))
    model.module.train()
    eval_frozen_modules(model.module)
    loss(model).backward()
    learning = {
        anatomy.tower_of(model.module, name) for name, p in model.module.named_parameters() if p.grad is not None
    }
    assert learning == {"text", None} and model.module.transformer.training
    assert torch.equal(outputs(model)[0], outputs(teacher)[0])


def test_a_tower_copied_from_the_teacher_stays_unchanged_in_every_stage_and_after_a_stop(tmp_path):
    short = {"losses": ["contrastive"], "steps": 3, "batch_size": 8, "lr": 1e-2}
    vision = {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
    save_artifact(
        artifact_from_model(teacher_clip(vision_cfg=vision), ({"stage": "x", "hash": "abc"},), {}), tmp_path / "teacher"
    )
    recipe = {
        "name": "one-tower",
        "teacher": {"artifact": str(tmp_path / "teacher")},
        "student": {"image": "teacher", "text": {"width": 32, "heads": 2, "layers": 1}},
        "data": {"train": [{"format": "scenes", "limit": 24}]},
        "stages": [
            {"distill": short},
            {"distill": {"name": "second", **short}},
            {"sparsify": short},
            {"quantize": {**short, "calibrate": 8, "exclude": ["visual.*"]}},
        ],
    }
    run = tmp_path / "run"
    compress(compress_plan_from(Recipe(**recipe)), run, lambda _: None)
    (run / "second" / "clipress.json").unlink()  # As after a stop, the second stage starts from a file.
    compress(compress_plan_from(Recipe(**recipe)), run, lambda _: None)
    teacher, *stages = [
        outputs(model_from_artifact(run / name)) for name in ("teacher", "distilled", "second", "sparse", "int8")
    ]
    for before, (image, text) in zip([teacher, *stages], stages, strict=False):
        assert torch.equal(image, teacher[0]) and not torch.equal(text, before[1])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "expected exactly one of model, image with text, inherit.*found none"),
        ({"model": "ViT-B-16", "image": "vit-t-16", "text": "clip-kd"}, "found model and image and text"),
        ({"image": "vit-t-16"}, "expected both towers, found image alone"),
        ({"image": "vit-t-16", "text": "clip-kd", "checkpoint": "a.pt"}, "used with 'model'"),
        ({"image": "teacher", "text": "teacher"}, "Leave out 'student'"),
        ({"image": "teacher", "text": "clip-kd"}, "the recipe has no 'teacher'"),
        ({"inherit": {"text": {"layers": 2}}}, "the recipe has no 'teacher'"),
        ({"inherit": {}}, r"inherit: expected sizes"),
        ({"inherit": {"image": {"depth": 2}}}, r"student\.inherit\.image\.depth: unknown key 'depth'"),
        ({"inherit": {"image": {"layers": 0}}}, r"student\.inherit\.image\.layers"),
        ({"inherit": {"image": {"layers": 1}}, "embed_dim": 64}, "are the teacher's. Leave them out"),
        ({"imgae": "vit-t-16", "text": "clip-kd"}, "unknown key 'imgae'. Did you mean 'image'"),
        ({"image": "vit-t-61", "text": "clip-kd"}, "vit-12x192-p16.*found 'vit-t-61'.*Did you mean 'vit-t-16'"),
        ({"image": "vit-t-16", "text": "clipkd"}, "found 'clipkd'.*Did you mean 'clip-kd'"),
        ({"image": "vit-2x100-p16", "text": "clip-kd"}, "multiple of 32, found 100"),
        ({"image": {"timm": "resnet81"}, "text": "clip-kd"}, "timm has no model 'resnet81'. Near it: .*resnet18"),
        ({"image": {"timm": "resnet18", "pool": "avg"}, "text": "clip-kd"}, "unknown key 'pool'"),
        ({"image": {"width": 64, "image_size": 32}, "text": "clip-kd"}, r"student\.image_size"),
        ({"image": "vit-t-16", "text": {"head": 2}}, "unknown key 'head'. Did you mean 'heads'"),
    ],
)
def test_an_invalid_student_section_is_reported_before_anything_is_built(section, message):
    with pytest.raises(RecipeError, match=message):
        check(section, has_teacher=False)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"image": "teacher", "text": "1x32", "image_size": 64}, "teacher's image size, as .* its own, 32; found 64"),
        ({"image": "vit-t-16", "text": {"context_length": 77}}, "context_length: expected the teacher's 24, found 77"),
        (
            {"image": "vit-t-16", "text": "teacher", "embed_dim": 64},
            "embed_dim: expected 32, as the text tower is the teacher's; found 64",
        ),
        ({"model": "ViT-B-61"}, "Did you mean 'ViT-B-16'"),
        ({"inherit": {"image": {"width": 64}}}, r"inherit\.image\.width: expected at most the teacher\'s 32, found 64"),
        ({"inherit": {"text": {"layers": 3}}}, r"inherit\.text\.layers: expected at most the teacher\'s 2, found 3"),
    ],
)
def test_a_student_section_that_does_not_fit_the_teacher_is_reported(section, message):
    with pytest.raises(RecipeError, match=message):
        student_from(section, teacher_clip(), 0)


def test_copying_a_tower_from_an_int8_teacher_is_refused():
    teacher = teacher_clip()
    int8 = Model(**{**teacher.__dict__, "quantization": {"dtype": "int8"}})
    with pytest.raises(RecipeError, match="INT8"):
        student_from({"image": "resnet-18", "text": "teacher"}, int8, 0)
