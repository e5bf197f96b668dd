"""Wrong pairs of the matching loss may be drawn from the rows of all processes, as BLIP's `negative_all_rank` does."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import torchrun
from task_students import STUDENTS

from clipress.tasks import task_named

JOB = Path(__file__).with_name("matching_job.py")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "seen.pt"
    done = subprocess.run([sys.executable, JOB, "all", out], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(out)


def run_twice(negatives, folder):
    done = torchrun(JOB, negatives, folder / "seen.pt")
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(folder / "seen.pt")


def loss_by_hand(arrays, parts):
    """Read every pair alone, without padding; wrong ones are the most similar of each part of a batch."""
    student = task_named("retrieval").student_from(
        {**STUDENTS["retrieval"], "dropout": 0, "context_length": 40}, None, 0
    )
    module, rows = student.module.eval(), []
    for part in parts:
        pixels, group = arrays["pixels"][part], arrays["group"][part]
        texts = [ids[ids != 0][None] for ids in arrays["ids"][part]]
        states = [module.image(one[None]) for one in pixels]
        images = torch.cat([module.image_embeds(one) for one in states])
        embeds = torch.cat([module.text_embeds(ids, torch.ones_like(ids)) for ids in texts])
        for i in range(len(part)):
            others = [j for j in range(len(part)) if group[j] != group[i]]
            text = max(others, key=lambda j: float(images[i] @ embeds[j]))
            image = max(others, key=lambda j: float(embeds[i] @ images[j]))
            for t, v, label in ((i, i, 1), (text, i, 0), (i, image, 0)):
                rows.append(F.cross_entropy(module.match(texts[t], None, states[v]), torch.tensor([label])))
    return float(torch.stack(rows).mean())


def test_wrong_pairs_of_all_processes_give_the_loss_and_gradients_of_one(alone, tmp_path):
    found = run_twice("all", tmp_path)
    assert len(set(found["widths"])) == 2  # texts of the two have other lengths
    with torch.no_grad():
        assert alone["loss"] == pytest.approx(loss_by_hand(alone["arrays"], [range(8)]), rel=1e-5)
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    others = found["gradients"].keys() - alone["gradients"].keys()  # DDP has a gradient for what nothing reads
    assert not any(found["gradients"][name].any() for name in others)
    for name, gradient in alone["gradients"].items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    for own, other in zip(found["scores"], alone["scores"], strict=True):
        torch.testing.assert_close(own / own.sum(), other / other.sum(), rtol=1e-4, atol=1e-9)


def test_wrong_pairs_of_a_process_are_its_own_by_default(alone, tmp_path):
    found = run_twice("own", tmp_path)
    with torch.no_grad():
        by_hand = loss_by_hand(alone["arrays"], [range(0, 8, 2), range(1, 8, 2)])
    assert found["loss"] == pytest.approx(by_hand, rel=1e-5)
    assert abs(found["loss"] - alone["loss"]) > 1e-4
