"""Batches come as bytes from the processes that decode them and are normalised where the model is, to the same bits."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from clipress.compress import loader
from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.loader import batches, normaliser, number_of_workers
from clipress.compress.settings import Runtime, Training
from clipress.data.spec import DataSpec, SourceSpec
from clipress.data.transforms import Augment, Preprocess, normalised
from clipress.errors import DataError
from clipress.models.load import new_model
from clipress.models.tiny import tiny_architecture


@pytest.fixture(scope="module")
def fabric():
    return start_fabric(Runtime(accelerator="cpu"))


def batch(fabric, workers, form="digits"):
    train = (SourceSpec(format=form, limit=40),)
    data = DataSpec(train=train, workers=workers, augment=Augment(shift=2, flip=True))
    context = Context(fabric, data, 0, title="t", checkpoints=None)
    return next(iter(batches(new_model(tiny_architecture(), 0), Training(steps=1, batch_size=8), context, 1)))


def test_a_batch_is_the_same_from_any_number_of_processes(fabric):
    alone, two = batch(fabric, 0), batch(fabric, 2)
    assert alone["pixels"].shape == (8, 3, 32, 32) and alone["pixels"].dtype == torch.float32
    for name in ("pixels", "ids", "group", "label"):
        assert torch.equal(alone[name], two[name]), name


@pytest.mark.parametrize(
    "form, names", [("statements", {"other_pixels"}), ("questions", {"answers", "answer_weight", "owner"})]
)
def test_second_images_and_answers_come_from_any_number_of_processes(fabric, form, names):
    alone, two = batch(fabric, 0, form), batch(fabric, 2, form)
    assert names <= alone.keys() == two.keys()
    for name, rows in alone.items():
        if name != "bad":
            assert torch.equal(rows, two[name]), name
    if form == "statements":
        assert alone["other_pixels"].dtype == torch.float32 and alone["other_pixels"].shape == (8, 3, 32, 32)
        assert not torch.equal(alone["other_pixels"], alone["pixels"]) and alone["label"].unique().tolist() == [0, 1]
    else:
        assert alone["owner"].tolist() == list(range(8)) and alone["answers"].shape[0] == 8


def test_pixels_are_normalised_to_the_bits_of_evaluation(monkeypatch):
    preprocess = Preprocess(size=16)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    wanted = torch.from_numpy(normalised(pixels, preprocess))
    here = torch.device("cpu")
    assert torch.equal(normaliser(preprocess, here)(torch.from_numpy(pixels)), wanted)
    # What runs on a GPU, on the CPU: the device is read once, to choose the way, and then by `torch.tensor`.
    tensor = torch.tensor
    monkeypatch.setattr(loader.torch, "tensor", lambda values, device: tensor(values))
    on_gpu = normaliser(preprocess, SimpleNamespace(type="cuda"))(torch.from_numpy(pixels))
    assert torch.equal(on_gpu, wanted) and on_gpu.is_contiguous()


@pytest.mark.parametrize(
    ("wanted", "device", "cores", "processes", "free", "found"),
    [
        ("auto", "cpu", 64, 1, 1 << 40, 0),
        ("auto", "cuda", 12, 1, 1 << 40, 11),
        ("auto", "cuda", 12, 4, 1 << 40, 2),
        ("auto", "cuda", 1, 1, 1 << 40, 1),
        ("auto", "cuda", 64, 1, 1 << 40, loader.MOST_WORKERS),
        ("auto", "cuda", 64, 1, 64 << 20, 1),  # a container's 64 MB, of which half may be used
        ("auto", "cuda", 64, 1, 16 << 20, 0),
        (3, "cuda", 1, 1, 0, 3),
        (3, "cpu", 1, 1, 0, 3),
    ],
)
def test_a_gpu_has_its_share_of_the_cores_as_far_as_shared_memory_goes(
    monkeypatch, tmp_path, wanted, device, cores, processes, free, found
):
    monkeypatch.setattr(loader, "usable_cores", lambda: cores)
    monkeypatch.setattr(loader, "SHARED", tmp_path)
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert number_of_workers(wanted, torch.device(device), batch_bytes=10 << 20) == found


@pytest.fixture
def torn(tmp_path):
    """Sixty images, every second one damaged."""
    rows = []
    for number in range(60):
        path = tmp_path / f"{number}.png"
        Image.effect_noise((32, 32), 50 + number).convert("RGB").save(path)
        if number % 2:
            path.write_bytes(path.read_bytes()[:100])
        rows.append({"image": path.name, "caption": f"image {number}"})
    (tmp_path / "all.json").write_text(json.dumps(rows))
    return SourceSpec(format="karpathy", annotations=tmp_path / "all.json", max_skipped=1)


@pytest.mark.parametrize("limit, is_enough", [(0.0, False), (0.05, False), (0.9, True)])
def test_as_many_records_are_replaced_as_the_data_section_allows(fabric, torn, limit, is_enough):
    context = Context(fabric, DataSpec(train=(torn,), max_replaced=limit, workers=0), 0, title="t")
    read = batches(new_model(tiny_architecture(), 0), Training(steps=6, batch_size=10), context, 6)
    if not is_enough:
        with pytest.raises(DataError, match=rf"At most {limit:.0%} may be bad.*or raise 'data\.max_replaced'"):
            list(read)
    else:
        met = [one for batch in read for one in batch["bad"]]
        assert len({one.index for one in met}) == len(met) == context.bad_records.different == 30
