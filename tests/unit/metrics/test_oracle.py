"""Metrics equal those of CLIP_benchmark on the same encoders.

`make test` installs it without its dependencies (transformers, pycocoevalcap, webdataset), which these tests do not use.
"""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from clipress.data.eval_sets import evalsets
from clipress.data.spec import SourceSpec
from clipress.data.transforms import Preprocess
from clipress.metrics.evaluate import evaluate
from clipress.metrics.outcomes import percents
from clipress.metrics.retrieval import retrieval
from clipress.metrics.zeroshot import classification, unit
from clipress.models.load import new_model
from clipress.models.tiny import tiny_architecture
from clipress.tasks.clip import encoders

pytestmark = pytest.mark.oracle


@pytest.fixture
def theirs(monkeypatch):
    """Two modules of CLIP_benchmark, with one line patched that fails in NumPy 2.4 (float() of an array)."""
    pytest.importorskip(
        "clip_benchmark", reason="clip-benchmark is not installed. Run: pip install --no-deps clip-benchmark"
    )
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    def accuracy(output, target, topk=(1,)):
        right = output.topk(max(topk), 1, True, True)[1].t().eq(target.view(1, -1))
        return [right[:k].float().sum().item() / len(target) for k in topk]

    monkeypatch.setattr(zeroshot_classification, "accuracy", accuracy)
    return zeroshot_classification, zeroshot_retrieval


class Given:
    """A model whose images are their embeddings and whose texts are rows of a table."""

    def __init__(self, table):
        self.table = torch.from_numpy(table)

    def encode_image(self, images):
        return images

    def encode_text(self, rows):
        return self.table[rows]


class Items(list):
    """A dataset with the attribute that CLIP_benchmark reads."""

    classes = ()


def retrieval_loader(images, texts):
    pairs = list(zip(images, texts, strict=True))
    return DataLoader(pairs, 8, collate_fn=lambda batch: (torch.stack([i for i, _ in batch]), [t for _, t in batch]))


@pytest.mark.parametrize("seed", range(5))
def test_retrieval_of_random_embeddings_with_any_number_of_captions(theirs, seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 7, 60)
    owner = np.repeat(np.arange(60), counts)
    images = unit(rng.standard_normal((60, 16))).astype(np.float32)
    texts = unit(images[owner] + 0.5 * rng.standard_normal((len(owner), 16))).astype(np.float32)
    rows = [np.flatnonzero(owner == image).tolist() for image in range(60)]
    loader = retrieval_loader(torch.from_numpy(images), rows)
    wanted = theirs[1].evaluate(Given(texts), loader, torch.tensor, "cpu", amp=False, recall_k_list=[1, 5, 10])
    found = percents(retrieval(images, texts, owner))
    for k in (1, 5, 10):
        assert 20 < found[f"text_r{k}"] and found[f"image_r{k}"] < 100
        assert found[f"text_r{k}"] == pytest.approx(100 * wanted[f"text_retrieval_recall@{k}"])
        assert found[f"image_r{k}"] == pytest.approx(100 * wanted[f"image_retrieval_recall@{k}"])


@pytest.mark.parametrize("used", [range(12), (0, 3, 11)])
def test_zero_shot_of_random_embeddings(theirs, used):
    rng = np.random.default_rng(0)
    classes = unit(rng.standard_normal((12, 16))).astype(np.float32)
    labels = rng.choice(list(used), 300, p=np.arange(1, len(used) + 1) / np.arange(1, len(used) + 1).sum())
    images = unit(classes[labels] + 0.4 * rng.standard_normal((300, 16))).astype(np.float32)
    items = Items(zip(torch.from_numpy(images), labels.tolist(), strict=True))
    items.classes = list(map(str, range(12)))
    wanted = theirs[0].evaluate(
        Given(classes), DataLoader(items, 32), lambda names: torch.tensor([*map(int, names)]), items.classes, ["{c}"],
        "cpu", amp=False,
    )  # fmt: skip
    found = percents(classification(images, classes, labels))
    assert 20 < found["top1"] < found["top5"] < 100
    keys = {"top1": "acc1", "top5": "acc5", "mean_per_class_recall": "mean_per_class_recall"}
    assert found == pytest.approx({ours: 100 * wanted[key] for ours, key in keys.items()})


def test_a_model_on_images_with_prompts_averaged_over_templates_and_all_captions(theirs):
    model, size = new_model(tiny_architecture(), 0), Preprocess(size=32)
    specs = [SourceSpec(format=form, split="test", limit=limit) for form, limit in (("scenes", 20), ("digits", 60))]
    scenes, digits = evalsets(specs)
    tokenize = model.tokenize()
    found = evaluate(*encoders(model, "Test"), [scenes, digits], size, tokenize)

    def tokenizer(texts):
        return torch.from_numpy(tokenize(texts))

    images = [torch.from_numpy(np.concatenate(list(s.pixel_batches(size)))) for s in (scenes, digits)]
    captions = [list(scenes.source.captions(i)) for i in range(20)]
    loader = retrieval_loader(images[0], captions)
    wanted = theirs[1].evaluate(model.module.eval(), loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    items = Items(zip(images[1], digits.labels().tolist(), strict=True))
    items.classes = digits.classes.names
    templates = [template.replace("{}", "{c}") for template in digits.classes.templates]
    wanted |= theirs[0].evaluate(
        model.module, DataLoader(items, 16), tokenizer, items.classes, templates, "cpu", amp=False
    )
    names = {"text_r": "text_retrieval_recall@", "image_r": "image_retrieval_recall@"}
    ours = {names[way] + k: found[f"scenes/{way}{k}"] for way in names for k in ("1", "5", "10")}
    ours |= {"acc1": found["digits/top1"], "acc5": found["digits/top5"]}
    ours["mean_per_class_recall"] = found["digits/mean_per_class_recall"]
    assert ours == pytest.approx({key: 100 * wanted[key] for key in ours})
