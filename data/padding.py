"""Texts without the ids that cannot matter: a causal text tower that pools at the end token reads nothing after it.

Every text is padded to the context length, 77 ids for most CLIPs, while a caption has 10 to 20. Cut at the longest text of a
batch, such a tower computes the same from a fraction of the work. So does one that hides padding from its attention and its pooling,
as those of transformers do. Other bidirectional towers, and those that pool over all ids or at the last one, read the padding too:
their texts stay whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LENGTHS = (8, 16, 24, 32, 48, 64)  # few, so that what is compiled or allocated for a shape is used again
CAPTION = 16  # ids of most captions, with both ends: what latency is stated for beside the whole length


@dataclass(frozen=True)
class TextEnd:
    """Where a text tower reads to: the first of the largest ids, as OpenAI's CLIP pools, the first end token, or all but padding."""

    eos: int | None = None
    """Id of the end token; None: the largest id of a text."""
    pad: int | None = None
    """Id of padding, where a text ends at its last other id; `eos` does not matter then."""

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        """Return how many ids of each text [N, L] are read: int64 [N]."""
        if self.pad is not None:
            return ids.shape[1] - (ids[:, ::-1] != self.pad).argmax(1)
        return (ids if self.eos is None else ids == self.eos).argmax(1) + 1


def without_padding(ids: np.ndarray, ends: Sequence[TextEnd | None]) -> np.ndarray:
    """Cut token ids [N, L] after the last one that a tower reads, rounded up to one of LENGTHS; `ends` are the towers'."""
    if not len(ids) or None in ends:
        return ids
    longest = max(int(end.lengths(ids).max()) for end in ends)
    return ids[:, : next((length for length in LENGTHS if length >= longest), ids.shape[1])]
