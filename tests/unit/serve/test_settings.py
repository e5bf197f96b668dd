"""The serve section of a recipe."""

import pytest

from clipress.errors import RecipeError
from clipress.recipe import checked
from clipress.serve.settings import ServeSettings


def test_by_default_both_backends_are_served_without_a_delay():
    settings = checked(ServeSettings, None, "serve")
    assert settings.backend == ("onnxruntime", "python")
    assert (settings.max_batch, settings.queue_delay_us) == (64, 0)
    assert (settings.instances, settings.threads) == ("auto", "auto")


@pytest.mark.parametrize("given", ["python", ["python"], ("python",)])
def test_one_backend_may_be_given_alone_or_in_a_list(given):
    assert checked(ServeSettings, {"backend": given}, "serve").backend == ("python",)


@pytest.mark.parametrize("backend", ["tensorflow", [], ["python", "x"], 3, None])
def test_backends_that_cannot_be_served_are_refused(backend):
    with pytest.raises(RecipeError, match=r"serve\.backend"):
        checked(ServeSettings, {"backend": backend}, "serve")


@pytest.mark.parametrize(
    "key, worst, best",
    [("max_batch", 0, 1), ("max_batch", 1025, 1024), ("queue_delay_us", -1, 0), ("queue_size", -1, 0)],
)
def test_numbers_are_bounded(key, worst, best):
    assert getattr(checked(ServeSettings, {key: best}, "serve"), key) == best
    with pytest.raises(RecipeError, match=rf"serve\.{key}.*found {worst}"):
        checked(ServeSettings, {key: worst}, "serve")


@pytest.mark.parametrize("key", ["instances", "threads"])
def test_sizes_are_numbers_or_auto(key):
    assert getattr(checked(ServeSettings, {key: 3}, "serve"), key) == 3
    for wrong in (0, 1025, "many", None):
        with pytest.raises(RecipeError, match=rf"serve\.{key}"):
            checked(ServeSettings, {key: wrong}, "serve")


def test_the_rate_limit_is_checked():
    given = {"rate_limit": {"resources": {"cores": 2}, "priority": 3}}
    assert checked(ServeSettings, given, "serve").rate_limit.resources == {"cores": 2}
    with pytest.raises(RecipeError, match=r"serve\.rate_limit\.resources\.cores"):
        checked(ServeSettings, {"rate_limit": {"resources": {"cores": 0}}}, "serve")
