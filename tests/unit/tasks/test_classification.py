"""The classification task: outputs equal timm's, invalid recipes are rejected, accuracy equals a reference."""

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from clipress.artifact import save_artifact
from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.settings import Runtime, Training
from clipress.compress.teacher_cache import caches_of
from clipress.compress.teachers import Teacher
from clipress.compress.train import train
from clipress.data import digits
from clipress.data.cache_files import CacheSettings
from clipress.data.eval_sets import EvalSet
from clipress.data.sources import Classes
from clipress.data.spec import DataSpec, SourceSpec
from clipress.data.transforms import Preprocess
from clipress.errors import ArtifactError, RecipeError
from clipress.models import surgery
from clipress.models.load import artifact_from_model
from clipress.tasks import evaluate_model, graphs_of, model_from_artifact, runs_of, task_named
from clipress.tasks.training import TrainingJob
from clipress.workflow.evaluate import evaluate_artifact

LABELS = ["cat", "dog", "owl"]
STUDENT = {"width": 32, "layers": 2, "heads": 2, "patch_size": 8, "image_size": 16, "labels": LABELS}


def classifier(seed=0, **changes):
    return task_named("classification").student_from({**STUDENT, **changes}, None, seed)


def stock():
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3).eval()


def test_outputs_equal_those_of_timms_vision_transformer():
    model, reference = classifier(), stock()
    state = surgery.stock_weights(model.module)
    reference.load_state_dict(state)
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.module.eval()(pixels), reference(pixels), atol=1e-5, rtol=1e-5)


def test_a_timm_name_builds_that_model_with_its_preprocessing():
    model = task_named("classification").student_from(
        {"model": "deit_tiny_patch16_224", "image_size": 32, "labels": LABELS}, None, 0
    )
    cfg = timm.get_pretrained_cfg("deit_tiny_patch16_224")
    assert model.module.embed_dim == 192 and model.module.num_classes == 3
    assert (model.preprocess.mean, model.preprocess.std, model.preprocess.size) == (cfg.mean, cfg.std, 32)


def test_a_teacher_from_a_file_of_timms_weights_computes_what_timm_computes(tmp_path):
    reference = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    torch.save({"model": reference.state_dict()}, tmp_path / "tiny.pth")  # as DeiT's published files are
    model = task_named("classification").load_pretrained("vit_tiny_patch16_224", str(tmp_path / "tiny.pth"), "teacher")
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.module(pixels), reference(pixels), atol=1e-5, rtol=1e-5)
    assert len(model.architecture["labels"]) == 1000 and not model.module.training


class Opened:
    def __reduce__(self):
        return print, ("code in a checkpoint ran",)


@pytest.mark.parametrize("content", ["missing", "text", "code", "other"])
def test_a_checkpoint_that_does_not_fit_is_one_message_and_none_of_its_code_runs(tmp_path, capsys, content):
    path = tmp_path / "weights.pth"
    if content == "text":
        path.write_bytes(b"hello")
    elif content != "missing":
        torch.save({"model": Opened() if content == "code" else {"head.weight": torch.ones(1)}}, path)
    with pytest.raises(ArtifactError, match=r"weights\.pth' cannot be loaded into vit_tiny_patch16_224"):
        task_named("classification").load_pretrained("vit_tiny_patch16_224", str(path), "teacher")
    assert "ran" not in capsys.readouterr().out


def test_the_weights_depend_on_the_seed_alone():
    torch.manual_seed(7)
    first = classifier(seed=1).module.state_dict()
    torch.manual_seed(8)
    assert all(torch.equal(tensor, first[name]) for name, tensor in classifier(seed=1).module.state_dict().items())
    assert not torch.equal(classifier(seed=2).module.head.weight, first["head.weight"])


def test_it_has_one_graph_from_pixels_to_logits():
    (graph,) = graphs_of(classifier()).values()
    assert (graph.name, graph.agrees) == ("image", "logits")
    assert [(one.name, one.shape) for one in graph.inputs] == [("pixel_values", (3, 16, 16))]
    assert [(one.name, one.shape) for one in graph.outputs] == [("logits", (3,))]


def test_outputs_are_bitwise_the_same_after_saving_and_loading(tmp_path):
    model = classifier()
    save_artifact(artifact_from_model(model, ({"stage": "a", "hash": "h"},), {}), tmp_path / "a")
    again = model_from_artifact(tmp_path / "a")
    inputs = graphs_of(model)["image"].example(3)
    assert again.task == "classification" and again.tokenizer is None
    np.testing.assert_array_equal(runs_of(model)["image"](inputs)["logits"], runs_of(again)["image"](inputs)["logits"])


class Labelled:
    """Sixty random images with labels."""

    name, fingerprint, has_images, has_texts = "pets", "x", True, False
    classes = Classes(tuple(LABELS), ("{}",))

    def __init__(self):
        rng = np.random.default_rng(0)
        self.pixels = rng.integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
        self.targets = rng.integers(0, 3, 60)

    def __len__(self):
        return 60

    def image(self, index):
        return self.pixels[index]

    def group(self, index):
        return int(self.targets[index])


def test_top1_is_the_fraction_of_images_whose_largest_logit_is_their_class():
    model, source = classifier(), Labelled()
    found = evaluate_model(model, [EvalSet(source, source.classes)])
    from PIL import Image
    from torchvision.transforms import functional as F

    mean, std = model.preprocess.mean, model.preprocess.std
    pixels = torch.stack([F.normalize(F.to_tensor(Image.fromarray(p)), mean, std) for p in source.pixels])
    with torch.no_grad():
        best = model.module(pixels).argmax(1).numpy()
    assert found["pets/top1"].values.mean() == pytest.approx((best == source.targets).mean())
    assert "pets/top5" not in found  # there are three classes


def test_data_with_different_classes_than_the_model_is_rejected():
    model, source = classifier(labels=["cat", "dog"]), Labelled()
    with pytest.raises(RecipeError, match="2 classes, found 3 in pets"):
        evaluate_model(model, [EvalSet(source, source.classes)])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"labels": LABELS}, r"expected either model \(a timm name\) or width .*found neither"),
        ({"width": 32}, "expected class names in labels or labels_file"),
        ({"width": 32, "heads": 3, "labels": LABELS}, r"width: expected a multiple of heads \(3\), found 32"),
        ({"width": 32, "labels": LABELS, "labels_file": "imagenet"}, "found both"),
        ({"model": "deit_tiny_patch61_224", "labels": LABELS}, "Did you mean 'deit_tiny_patch16_224'"),
        ({"width": 32, "lables": LABELS}, "unknown key 'lables'. Did you mean 'labels'"),
        ({"model": "deit_tiny_distilled_patch16_224", "labels": LABELS}, "expected a plain ViT from timm"),
    ],
)
def test_an_invalid_student_is_reported_in_one_message(section, message):
    task = task_named("classification")
    with pytest.raises((RecipeError, ArtifactError), match=message):
        task.check_student(section, False)
        task.student_from(section, None, 0)


@pytest.mark.parametrize(
    "change",
    [{"sizes": {"depth": 10**6}}, {"sizes": {"embed_dim": -4}}, {"labels": []}, {"labels": [1]}, {"timm_model": 3}],
    ids=str,
)
def test_an_impossible_architecture_is_rejected_before_memory_is_allocated(change):
    architecture = {**classifier().architecture, **change}
    with pytest.raises(ArtifactError):
        task_named("classification").build(architecture)


def test_a_student_shares_its_teachers_images_and_classes():
    teacher, task = classifier(), task_named("classification")
    student = task.student_from({"width": 16, "layers": 1, "heads": 1, "patch_size": 8}, teacher, 0)
    assert student.architecture["labels"] == LABELS and student.preprocess == teacher.preprocess == Preprocess(size=16)
    with pytest.raises(RecipeError, match="expected the teacher's labels, found others"):
        task.student_from({"width": 16, "heads": 1, "labels": ["a", "b", "c"]}, teacher, 0)
    larger = task.student_from({"width": 16, "heads": 1, "image_size": 32}, teacher, 0)
    assert larger.preprocess == Preprocess(size=32)


def test_cached_logits_train_as_the_running_teacher_does(tmp_path):
    data = DataSpec(train=(SourceSpec(format="digits", limit=48),))
    student = {**STUDENT, "image_size": 32, "labels": list(digits.CLASSES)}
    teacher, records = task_named("classification").student_from(student, None, 1), []
    with torch.no_grad():
        teacher.module.head.weight.mul_(20)  # so that the teacher has opinions
    fabric = start_fabric(Runtime(accelerator="cpu"))
    for cached in (False, True):
        caches = ()
        if cached:
            plan = SimpleNamespace(data=data, runtime=Runtime())
            made = caches_of(Teacher(teacher, ({"hash": "t"},), None), CacheSettings(), plan, fabric, print, tmp_path)
            assert made[0].manifest.dim == 10 and made[0].manifest.tokenizer is None
            caches = ((*made,),)
        context = Context(fabric, data, 0, teachers=(teacher,), caches=caches, title="t")
        learner = task_named("classification").student_from(student, None, 0)
        records.append(train(learner, Training(steps=3, batch_size=16, lr=1e-3), ("logits",), context)["last"]["loss"])
    assert records[1] == pytest.approx(records[0], rel=5e-3) and records[0] > 0


def test_token_features_cannot_come_from_a_cache():
    model = classifier()
    needs = frozenset({"teacher", "tokens"})
    job = TrainingJob("t", model, (model,), needs, (), "both", (Labelled(),), cached=True)
    with pytest.raises(RecipeError, match="'tokens' requires a teacher that runs"):
        task_named("classification").lesson(job)


def test_a_linear_probe_of_a_classifier_is_refused_before_anything_is_evaluated(tmp_path):
    folder = save_artifact(artifact_from_model(classifier(), (), {}), tmp_path / "a")
    with pytest.raises(RecipeError, match=r"^Linear probe of .*a: expected a CLIP, found a classification model"):
        evaluate_artifact(folder, [], [(None, None)])
