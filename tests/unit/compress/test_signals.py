"""A stopped run saves a checkpoint of its last step; non-finite states are never saved."""

import errno
import os
import signal

import pytest
import torch
from torch import nn

from clipress.compress.checkpoint import steps_saved
from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.hook import Hook
from clipress.compress.learner import Learner
from clipress.compress.loader import batches
from clipress.compress.losses import terms_from
from clipress.compress.settings import Runtime, Training
from clipress.compress.train import MAX_BAD_STEPS, train
from clipress.data.spec import DataSpec, SourceSpec
from clipress.errors import ArtifactError, ClipressError, Stopped
from clipress.models.load import new_model
from clipress.models.tiny import tiny_architecture

LOSSES = {"contrastive": 1.0, "feature": 10.0, "momentum-contrastive": 1.0}
CONFIG = Training(steps=7, batch_size=8, lr=1e-3, queue_size=16)


class At(Hook):
    """Do something in a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def before(self, step, arrays):
        if step == self.step:
            self.act()


@pytest.fixture(scope="module")
def fabric():
    return start_fabric(Runtime(accelerator="cpu"))


def context(fabric, folder, every=100, **more):
    data = DataSpec(train=(SourceSpec(format="digits", limit=40),), **more)
    teacher, runtime = new_model(tiny_architecture(layers=1), 1), Runtime(checkpoint_every=every)
    return Context(
        fabric, data, 0, (teacher,), runtime, folder / "log.jsonl", checkpoints=folder / "kept", title="made"
    )


def trained(own, hooks=(), config=CONFIG):
    torch.manual_seed(0)
    student = new_model(tiny_architecture(layers=1, embed_dim=16), 0)
    train(student, config, LOSSES, own, hooks)
    return student.module.state_dict()


def same(a, b):
    return all(torch.equal(a[name], tensor) for name, tensor in b.items())


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("step", [2, 6])
def test_a_signal_ends_a_training_after_its_step_with_a_checkpoint(fabric, tmp_path, number, code, step, workers):
    expected = trained(context(fabric, tmp_path / "a"))
    own, before = context(fabric, tmp_path / "b", workers=workers), signal.getsignal(number)
    message = rf"made: stopped by {number.name} after {step + 1} of 7 steps.*from the last checkpoint"
    with pytest.raises(Stopped, match=message) as stop:
        trained(own, [At(step, lambda: signal.raise_signal(number))])
    assert stop.value.exit_code == code and signal.getsignal(number) == before
    assert steps_saved(own.checkpoints) == [step + 1]
    assert same(trained(own, [At(99, None)]), expected)
    assert len(own.log.read_text().splitlines()) == 7


def test_a_second_ctrl_c_does_not_wait_for_the_step(fabric, tmp_path):
    own = context(fabric, tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore SIGINT for background jobs
    try:
        with pytest.raises(KeyboardInterrupt):
            trained(own, [At(2, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])])
    finally:
        signal.signal(signal.SIGINT, before)
    assert steps_saved(own.checkpoints) == []


def test_a_stage_without_checkpoints_reports_that_it_starts_over(fabric, tmp_path):
    with pytest.raises(Stopped, match="from the start of this stage"):
        trained(context(fabric, tmp_path, every=0), [At(2, lambda: signal.raise_signal(signal.SIGTERM))])


def test_loader_workers_ignore_signals_to_the_process_group(fabric, tmp_path):
    own = context(fabric, tmp_path, workers=2)

    def to_all():
        for child in torch.multiprocessing.active_children():
            os.kill(child.pid, signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped):
        trained(own, [At(2, to_all)])
    assert steps_saved(own.checkpoints) == [3]


def test_a_full_disk_stops_a_training_which_resumes_from_its_last_good_checkpoint(fabric, tmp_path, monkeypatch):
    expected = trained(context(fabric, tmp_path / "a"))
    own, save = context(fabric, tmp_path / "b", every=2), torch.save

    def until_full(state, file):
        save({"half": torch.zeros(9)}, file)
        if state["progress"]["step"] == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.seek(0)
        save(state, file)

    with monkeypatch.context() as patch, pytest.raises(ArtifactError, match=r"rank0-00000006.*No space left.*kept"):
        patch.setattr(torch, "save", until_full)
        trained(own)
    assert [path.name for path in sorted(own.checkpoints.iterdir())] == ["rank0-00000002.pt", "rank0-00000004.pt"]
    assert same(trained(own), expected)


def test_a_truncated_log_does_not_prevent_resuming(fabric, tmp_path):
    own = context(fabric, tmp_path, every=2)
    with pytest.raises(Stopped):
        trained(own, [At(3, lambda: signal.raise_signal(signal.SIGTERM))])
    with own.log.open("a") as file:
        file.write('{"step": 3, "l{"step": 4}\n{"step"')
    trained(own, [At(99, None)])
    assert [line[:10] for line in own.log.read_text().splitlines()] == [f'{{"step": {n}' for n in range(7)]


def test_consecutive_non_finite_steps_are_never_saved(fabric, tmp_path):
    own = context(fabric, tmp_path, every=2)
    student = new_model(tiny_architecture(layers=1), 0)
    poison = At(5, lambda: student.module.visual.proj.data.fill_(float("nan")))
    with pytest.raises(ClipressError, match=f"contrastive was not finite for {MAX_BAD_STEPS} steps"):
        train(student, Training(steps=50, batch_size=8), {"contrastive": 1.0}, own, [poison])
    assert steps_saved(own.checkpoints) == [2, 4]
    kept = torch.load(own.checkpoints / "rank0-00000004.pt")["learner"]
    assert all(tensor.isfinite().all() for tensor in kept["student"].values() if tensor.is_floating_point())


def test_a_non_finite_step_does_not_change_queues_and_running_statistics(fabric, tmp_path):
    """A batch norm after the patch embedding stands in for those of a convolutional tower."""
    own, student = context(fabric, tmp_path), new_model(tiny_architecture(layers=1, embed_dim=16), 0)
    student.module.visual.conv1 = nn.Sequential(student.module.visual.conv1, nn.BatchNorm2d(32))
    learner = Learner(student, CONFIG, terms_from(LOSSES, "made"), own)
    first, second = list(batches(student, CONFIG, own, 2))
    for arrays in (first, second):
        arrays.pop("bad")
    assert learner.gradients(0, first, ())[2]
    queue = {name: rows.clone() for name, rows in learner.ema.past.items()}
    norm = student.module.visual.conv1[1]
    mean, counted = norm.running_mean.clone(), norm.num_batches_tracked.clone()
    second["pixels"][3] = float("nan")
    assert not learner.gradients(1, second, ())[2]
    assert queue.keys() == learner.ema.past.keys() and queue
    assert all(torch.equal(rows, queue[name]) for name, rows in learner.ema.past.items())
    assert torch.equal(norm.running_mean, mean) and torch.equal(norm.num_batches_tracked, counted)


def test_non_finite_gradients_of_a_losss_own_parameters_are_detected(fabric, tmp_path):
    own, student = context(fabric, tmp_path), new_model(tiny_architecture(layers=1, embed_dim=16), 0)
    learner = Learner(student, CONFIG, terms_from(LOSSES, "made"), own)
    parameter = next(p for p in learner.objective.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    (arrays, *_) = batches(student, CONFIG, own, 1)
    arrays.pop("bad")
    assert not learner.gradients(0, arrays, ())[2]
