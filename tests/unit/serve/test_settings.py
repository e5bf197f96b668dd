"""What the serve section of a recipe may say."""

import pytest

from clipress.errors import RecipeError
from clipress.recipe import checked
from clipress.serve.settings import ServeSettings


def test_without_a_section_both_backends_are_served_without_a_delay():
    settings = checked(ServeSettings, None, "serve")
    assert settings.backend == ("onnxruntime", "python")
    assert (settings.max_batch, settings.queue_delay_us, settings.instances, settings.threads) == (64, 0, 1, 1)


@pytest.mark.parametrize("given", ["python", ["python"], ("python",)])
def test_one_backend_may_be_given_alone_or_in_a_list(given):
    assert checked(ServeSettings, {"backend": given}, "serve").backend == ("python",)


@pytest.mark.parametrize("backend", ["tensorflow", [], ["python", "x"], 3, None])
def test_backends_that_cannot_be_served_are_refused(backend):
    with pytest.raises(RecipeError, match=r"serve\.backend"):
        checked(ServeSettings, {"backend": backend}, "serve")


@pytest.mark.parametrize(
    "key, worst, best",
    [("max_batch", 0, 1), ("max_batch", 1025, 1024), ("queue_delay_us", -1, 0), ("instances", 0, 1), ("threads", 0, 1)],
)
def test_numbers_are_bounded(key, worst, best):
    assert getattr(checked(ServeSettings, {key: best}, "serve"), key) == best
    with pytest.raises(RecipeError, match=rf"serve\.{key}.*found {worst}"):
        checked(ServeSettings, {key: worst}, "serve")
