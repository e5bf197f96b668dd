"""Compiled steps compute what uncompiled ones do: losses, masks, scores and weights. Graphs are traced, then run by torch's kernels."""

from dataclasses import replace

import pytest
import torch

from clipress.compress import fabric, learner, teachers
from clipress.compress.context import Context
from clipress.compress.loader import batches
from clipress.compress.losses import terms_from
from clipress.compress.prune.budget import Budget
from clipress.compress.prune.gates import Gates
from clipress.compress.prune.search import Prune, Search
from clipress.compress.settings import Runtime
from clipress.compress.train import Learner, Loop
from clipress.data.spec import DataSpec, SourceSpec
from clipress.errors import RecipeError
from clipress.models.load import new_model
from clipress.models.tiny import tiny_architecture

STEPS = 8


@pytest.fixture(scope="module")
def context():
    data = DataSpec(train=(SourceSpec(format="digits", limit=40),))
    return Context(fabric.start_fabric(Runtime(accelerator="cpu")), data, 0, title="t", checkpoints=None)


@pytest.fixture
def graphs(monkeypatch):
    """Compile without a C++ compiler, and return how often each module was compiled whole, without a break in its graph."""
    compiled = []

    def compile_in_place(module):
        def backend(graph, inputs):
            compiled.append(module)
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        module.compile(dynamic=False, backend=backend, fullgraph=True)

    for user in (learner, teachers):
        monkeypatch.setattr(user, "compile_in_place", compile_in_place)
    return compiled


def search(context, compiled, criterion, losses, chunks=1):
    """Return the log, the scores and the masks of a search, and the trained student."""
    settings = Prune(budget=Budget(params=0.5), criterion=criterion, steps=STEPS, update_every=4, batch_size=8)
    model, teacher = (new_model(tiny_architecture(layers=1), seed) for seed in (0, 1))
    own = replace(context, teachers=(teacher,), runtime=Runtime(grad_cache_chunks=chunks, compile=compiled))
    hook = Search(
        model, Gates(model.module, "upop" if criterion == "upop" else "separate"), settings, STEPS, 0, lambda x: x
    )
    loop = Loop(Learner(model, settings, terms_from(losses, "t"), own), [hook], settings, own)
    lines = []
    for step, arrays in enumerate(batches(model, settings, own, STEPS, whole_texts="tokens" in losses)):
        arrays.pop("bad")
        loop.take_step(step, arrays, 1e-3, lines.append)
    loop.settle(lines.append)
    loop.learner.finish()
    masks = [site.mask for site in hook.gates.sites]
    return [line["loss"] for line in lines], hook.seen.sums, masks, model.module.state_dict()


@pytest.mark.parametrize(
    ("criterion", "losses", "chunks"),
    [
        ("fisher", ("contrastive", "feature", "tokens", "masked-feature"), 1),
        ("fisher", ("contrastive", "affinity"), 2),
        ("upop", ("contrastive", "momentum-contrastive"), 1),
        ("gauss-newton", ("contrastive",), 1),
    ],
)
def test_a_compiled_search_is_the_search(context, graphs, criterion, losses, chunks):
    wanted = search(context, False, criterion, losses, chunks)
    assert not graphs
    found = search(context, True, criterion, losses, chunks)
    assert len({id(module) for module in graphs}) == (1 if "feature" not in losses and "affinity" not in losses else 2)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert any((mask == 0).any() for mask in found[2])


def test_a_step_is_compiled_once_per_length_of_texts(context, graphs):
    search(context, True, "fisher", ("contrastive",))
    assert len(graphs) == 1


def test_shards_are_not_compiled():
    with pytest.raises(RecipeError, match=r"runtime.compile: expected strategy auto or ddp, found fsdp2"):
        Runtime(compile=True, strategy="fsdp2")
