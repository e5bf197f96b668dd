"""Registries: entries, suggestions for unknown names, and plugins of other distributions."""

import subprocess
import sys
import textwrap

import pytest

from clipress.errors import RecipeError
from clipress.registry import Registry


def test_a_registered_entry_is_found_by_its_name():
    colors = Registry("color")
    red = colors.register("red")(lambda: "#f00")
    assert colors["red"] is red and list(colors) == ["red"] and len(colors) == 1 and "blue" not in colors


def test_an_unknown_name_is_reported_with_the_nearest_known_one():
    colors = Registry("color")
    colors.register("red")(str)
    with pytest.raises(RecipeError, match=r"paint\.color: unknown color 'rde'\. Did you mean 'red'\?"):
        colors.find("rde", "paint.color")


def test_an_entry_may_be_registered_for_a_block_only():
    colors = Registry("color")
    with colors.registered("red", str) as entry:
        assert colors["red"] is entry is str
    assert not colors


def test_registering_a_name_twice_is_an_error():
    colors = Registry("color")
    colors.register("red")(str)
    with pytest.raises(ValueError, match="color 'red' is registered twice"):
        colors.register("red")(int)


def test_packages_are_imported_on_first_access(tmp_path, monkeypatch):
    package = tmp_path / "palette"
    package.mkdir()
    (package / "__init__.py").write_text(
        'from clipress.registry import Registry\nCOLORS = Registry("color", "palette")\n'
    )
    (package / "red.py").write_text('from palette import COLORS\n\n@COLORS.register("red")\nclass Red:\n    pass\n')
    monkeypatch.syspath_prepend(tmp_path)
    from palette import COLORS

    assert "palette.red" not in sys.modules
    assert list(COLORS) == ["red"] and COLORS["red"].__name__ == "Red"


def test_a_failing_import_is_raised_on_every_access(tmp_path, monkeypatch):
    (tmp_path / "broken_palette.py").write_text("raise OSError('no paint')\n")
    monkeypatch.syspath_prepend(tmp_path)
    colors = Registry("color", "broken_palette")
    for _ in range(2):
        with pytest.raises(OSError, match="no paint"):
            list(colors)


def test_an_entry_point_adds_the_methods_of_another_distribution(tmp_path):
    (tmp_path / "extra_losses.py").write_text(
        textwrap.dedent(
            """
            from clipress.compress.losses import LOSSES, Loss

            @LOSSES.register("nothing")
            class Nothing(Loss):
                def forward(self, batch):
                    return 0.0
            """
        )
    )
    about = tmp_path / "extra_losses-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: extra-losses\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[clipress.plugins]\nlosses = extra_losses\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from clipress.compress.losses import LOSSES; print(*LOSSES)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "nothing" in found.stdout.split() and "contrastive" in found.stdout.split()
