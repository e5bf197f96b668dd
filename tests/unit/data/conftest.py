"""Images that tests of tables share."""

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with three images of different heights, one of them in a folder of its own."""
    root = tmp_path_factory.mktemp("images")
    for size, name in enumerate(("red.png", "a/blue.png", "a..b.png"), 4):
        (root / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, size)).save(root / name)
    return root
