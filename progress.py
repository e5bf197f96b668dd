"""How long work shows its progress: a bar with an ETA on a screen, a line now and then where nobody watches."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: int | None, title: str, unit: str, **shown: Any) -> tqdm:
    """Return a bar on stderr over `total` units; None: how many there are is not known. `shown` goes to tqdm."""
    return tqdm(total=total, desc=title, unit=unit, mininterval=0.2 if sys.stderr.isatty() else 15.0, **shown)
