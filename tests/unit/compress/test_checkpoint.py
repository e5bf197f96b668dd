"""A stopped run resumes from its last checkpoint and ends bit for bit where an uninterrupted one does."""

import json
import threading
from dataclasses import replace

import pytest
import torch
from task_students import STUDENTS

from clipress.compress import checkpoint
from clipress.compress.checkpoint import Checkpoints, load_checkpoint, save_checkpoint, steps_saved
from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.hook import Hook
from clipress.compress.prune.search import Prune
from clipress.compress.prune.search import run as prune
from clipress.compress.settings import Runtime, Training
from clipress.compress.train import train
from clipress.data.spec import DataSpec, SourceSpec
from clipress.data.transforms import Augment
from clipress.errors import ArtifactError
from clipress.models.load import new_model
from clipress.models.tiny import tiny_architecture
from clipress.tasks import task_named

LOSSES = {
    "contrastive": 1.0,
    "feature": 10.0,
    "momentum-contrastive": 1.0,
}  # a trained projection, an EMA model, a queue


class Stopped(Exception):
    pass


class StopAt(Hook):
    def __init__(self, step):
        self.step = step

    def before(self, step, arrays):
        if step == self.step:
            raise Stopped


@pytest.fixture(scope="module")
def fabric():
    return start_fabric(Runtime(accelerator="cpu"))


def context(fabric, folder, every=2):
    data = DataSpec(train=(SourceSpec(format="digits", limit=40),), augment=Augment(shift=2))
    teacher = new_model(tiny_architecture(layers=1), 1)
    return Context(
        fabric,
        data,
        0,
        (teacher,),
        Runtime(checkpoint_every=every),
        folder / "log.jsonl",
        checkpoints=folder / "kept",
        title="t",
    )


def trained(own, hooks=()):
    torch.manual_seed(0)
    student = new_model(tiny_architecture(layers=1, embed_dim=16), 0)
    record = train(student, Training(steps=7, batch_size=8, lr=1e-3, queue_size=16), LOSSES, own, hooks)
    return student.module.state_dict(), record["last"]


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_stopped_training_ends_where_an_uninterrupted_one_does(fabric, tmp_path, stop):
    expected, last = trained(context(fabric, tmp_path / "a"))
    own = context(fabric, tmp_path / "b")
    with pytest.raises(Stopped):
        trained(own, [StopAt(stop)])
    assert steps_saved(own.checkpoints) == [step for step in (2, 4, 6) if step <= stop][-2:]
    found, again = trained(own, [StopAt(99)])
    assert all(torch.equal(expected[name], tensor) for name, tensor in found.items()) and again == last
    assert len(own.log.read_text().splitlines()) == 7


@pytest.mark.parametrize("stop", [2, 5])
def test_a_stopped_training_leaves_out_the_branches_that_an_uninterrupted_one_does(fabric, tmp_path, stop):
    def weights(own, hooks=()):
        student = {**STUDENTS["classification"], "layers": 2}
        model = task_named("classification").student_from(student, None, 0)
        config = Training(steps=6, batch_size=8, lr=1e-3, drop_path=0.5)
        train(model, config, ("classification",), replace(own, teachers=()), hooks)
        return model.module.state_dict()

    expected, own = weights(context(fabric, tmp_path / "a")), context(fabric, tmp_path / "b")
    with pytest.raises(Stopped):
        weights(own, [StopAt(stop)])
    found = weights(own, [StopAt(99)])
    assert all(torch.equal(expected[name], tensor) for name, tensor in found.items())


@pytest.mark.parametrize("criterion", ["fisher", "upop"])
def test_a_stopped_search_cuts_what_an_uninterrupted_one_cuts(fabric, tmp_path, monkeypatch, criterion):
    settings = Prune(
        budget={"params": 0.6}, criterion=criterion, steps=8, batch_size=8, update_every=2, lr=1e-3,
        align={"head_dim": 1, "ffn": 1}, min_keep={"head_dim": 0, "ffn": 0.1},
    )  # fmt: skip

    def cut(own):
        model, details = prune(settings, new_model(tiny_architecture(layers=1), 0), own)
        return model.module.state_dict(), details["shapes"]

    expected, shapes = cut(context(fabric, tmp_path / "a", every=3))
    own = context(fabric, tmp_path / "b", every=3)
    from clipress.compress.prune.search import Search

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        before = Search.before
        patch.setattr(
            Search, "before", lambda self, step, arrays: StopAt(5).before(step, arrays) or before(self, step, arrays)
        )
        cut(own)
    assert steps_saved(own.checkpoints) == [3]
    found, again = cut(own)
    assert again == shapes and all(torch.equal(expected[name], tensor) for name, tensor in found.items())


def test_a_checkpoint_of_more_processes_is_not_used_for_scores(fabric, tmp_path, caplog):
    class Scores(StopAt):
        def state(self):
            return {"sums": 1}

    expected, _ = trained(context(fabric, tmp_path / "a"))
    own = context(fabric, tmp_path / "b")
    with pytest.raises(Stopped):
        trained(own, [Scores(5)])
    for path in own.checkpoints.iterdir():
        torch.save(torch.load(path) | {"world": 2}, path)
    found, _ = trained(own, [Scores(99)])
    assert "saved by 2 processes" in caplog.text and len(own.log.read_text().splitlines()) == 7
    assert all(torch.equal(expected[name], tensor) for name, tensor in found.items())


def test_another_number_of_processes_goes_on_and_says_so(fabric, tmp_path, caplog):
    own = context(fabric, tmp_path)
    with pytest.raises(Stopped):
        trained(own, [StopAt(5)])
    for path in own.checkpoints.iterdir():
        torch.save(torch.load(path) | {"world": 2}, path)
    trained(own, [StopAt(99)])
    assert "resumed at step 4 on another number of processes (1, before: 2)" in caplog.text
    rows = [json.loads(line) for line in own.log.read_text().splitlines()]
    assert [row for row in rows if "loss" not in row] == [{"step": 4, "processes": 1, "processes_before": 2}]
    assert [row["step"] for row in rows if "loss" in row] == [*range(7)]


def test_a_checkpoint_that_cannot_be_read_is_skipped(fabric, tmp_path, caplog):
    expected, _ = trained(context(fabric, tmp_path / "a"))
    own = context(fabric, tmp_path / "b")
    with pytest.raises(Stopped):
        trained(own, [StopAt(6)])
    newest = own.checkpoints / "rank0-00000006.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    found, _ = trained(own, [StopAt(99)])
    assert "cannot be read" in caplog.text and all(
        torch.equal(expected[name], tensor) for name, tensor in found.items()
    )


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (print, ("owned",))

    (tmp_path / "rank0-00000001.pt").write_bytes(pickle.dumps(Evil()))
    assert load_checkpoint(tmp_path, 1) is None


def test_only_the_last_two_are_kept_and_an_unwritable_folder_is_reported(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / "kept", step, {"x": torch.zeros(2)})
    assert steps_saved(tmp_path / "kept") == [2, 3]
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="could not be written"):
        save_checkpoint(tmp_path / "file" / "kept", 1, {})


def test_training_goes_on_while_a_checkpoint_is_written(fabric, tmp_path, monkeypatch):
    """The first file is not begun before the fifth step: nothing would end if training waited for it."""
    expected = context(fabric, tmp_path / "a", every=3)
    with pytest.raises(Stopped):
        trained(expected, [StopAt(4)])
    own, may_write, running = context(fabric, tmp_path / "b", every=3), threading.Event(), []

    def late(folder, step, state, rank=0):
        running.append(step)
        assert may_write.wait(60) and len(running) == 1  # one at a time
        save_checkpoint(folder, step, state, rank)
        running.remove(step)

    monkeypatch.setattr(checkpoint, "save_checkpoint", late)

    class Allow(Hook):
        def before(self, step, arrays):
            if step == 5:
                assert running == [3] and not steps_saved(own.checkpoints)
                may_write.set()

    trained(own, [Allow()])
    assert steps_saved(own.checkpoints) == [3, 6]
    # Steps 3 and 4 had changed the weights before they were written.
    early, later = (load_checkpoint(one.checkpoints, 3)["learner"] for one in (expected, own))
    torch.testing.assert_close(later, early, rtol=0, atol=0)


def test_a_checkpoint_that_cannot_be_written_stops_the_training(fabric, tmp_path, monkeypatch):
    def full(*_):
        raise ArtifactError("the disk is full")

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    with pytest.raises(ArtifactError, match="the disk is full"):
        trained(context(fabric, tmp_path, every=6))


def test_an_error_of_the_training_is_not_hidden_by_one_of_a_checkpoint(fabric, tmp_path, monkeypatch):
    def full(*_):
        raise ArtifactError("the disk is full")

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    with pytest.raises(Stopped):
        trained(context(fabric, tmp_path, every=3), [StopAt(3)])


def test_weights_that_training_does_not_change_are_not_stored(fabric, tmp_path):
    frozen, own = Training(steps=5, batch_size=8, lr=1e-3, towers="image"), context(fabric, tmp_path / "a")
    losses = ("contrastive", "momentum-contrastive")

    def train_image_tower(own, hooks=()):
        torch.manual_seed(0)
        student = new_model(tiny_architecture(layers=1, embed_dim=16), 0)
        train(student, frozen, losses, own, hooks)
        return student.module.state_dict()

    expected = train_image_tower(own)
    other = context(fabric, tmp_path / "b")
    with pytest.raises(Stopped):
        train_image_tower(other, [StopAt(4)])
    kept = load_checkpoint(other.checkpoints, 4)["learner"]
    text = {"token_embedding.weight", "text_projection", "positional_embedding", "ln_final.weight"}
    for names in (kept["student"].keys(), kept["ema"]["copy"].keys()):
        assert "visual.proj" in names and not names & text
    found = train_image_tower(other, [StopAt(99)])
    assert all(torch.equal(expected[name], tensor) for name, tensor in found.items())


def test_auto_lets_checkpoints_take_two_percent_of_the_time(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: clock[0])

    def slow(*_):
        clock[0] += 10

    monkeypatch.setattr(checkpoint, "save_checkpoint", slow)
    with Checkpoints(tmp_path, "auto") as own:
        due = []
        for step in range(1, 2000):
            clock[0] += 1
            if own.is_due(step):
                due.append(clock[0])
                own.save(step, {})
                own.wait()
    first, *others = due
    assert 60 < first < 63 and others and all(500 < b - a < 515 for a, b in zip(due, others, strict=False))


def test_shared_weights_are_copied_and_stored_once(tmp_path):
    weight = torch.randn(100_000)
    with Checkpoints(tmp_path, 1) as own:
        for step in (1, 2):
            own.save(step, {"a": weight, "b": weight.detach(), "rows": [weight[:3], torch.tensor(step)]})
    read = load_checkpoint(tmp_path, 2)
    assert (tmp_path / "rank0-00000002.pt").stat().st_size < 1.1 * weight.nbytes
    assert (
        torch.equal(read["a"], weight) and torch.equal(read["b"], weight) and torch.equal(read["rows"][0], weight[:3])
    )
    assert read["rows"][1] == 2 and load_checkpoint(tmp_path, 1)["rows"][1] == 1


def test_no_checkpoints_if_they_are_disabled(fabric, tmp_path):
    own = context(fabric, tmp_path, every=0)
    trained(own)
    assert not own.checkpoints.exists()
    trained(replace(own, checkpoints=None))
