"""Is INT8, is 2:4, faster on this machine? Said in one line each, with the artefact to keep.

A stage is compared with the one it was made from, in the same rounds. Faster means: the 95 % interval lies above 1 and the
ratio is at least 1.02: less is not worth an artefact, and where sessions could not be opened anew it may be luck (latency.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from clipress.bench.compare import LEAST_ROUNDS, Ratio

METHODS = {"quantize": "INT8", "sparsify": "2:4"}
MATTERS, UNDECIDED = 1.02, 1.10
Case = tuple[str, int]


def verdicts(
    rows: Sequence[dict[str, Any]], cases: Sequence[Case], ratio: Callable[[str, str, Case], Ratio]
) -> list[dict[str, Any]]:
    """Return a verdict per INT8 or 2:4 row whose origin was measured too.

    ratio: (origin, row, case) -> how many times as fast the row is. The last case of the image tower decides.
    """
    told = []
    for row in rows:
        origin = _origin(row, rows)
        if origin is None or not cases:
            continue
        ratios = {case: ratio(origin["stage"], row["stage"], case) for case in cases}
        told.append(_verdict(row, origin, ratios))
    return told


def _origin(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the measured row, on the same backend, that a row's INT8 or 2:4 was put on."""
    lineage = row.get("lineage") or [{}]
    if lineage[-1].get("kind") not in METHODS:
        return None
    made = {other["lineage"][-1].get("hash"): other for other in rows if other.get("lineage") and _alike(row, other)}
    earlier = (made.get(record.get("hash")) for record in reversed(lineage[:-1]))
    return next((found for found in earlier if found is not None), None)


def _alike(row: dict[str, Any], other: dict[str, Any]) -> bool:
    return row is not other and row["backend"] == other["backend"]


def _verdict(row: dict[str, Any], origin: dict[str, Any], ratios: dict[Case, Ratio]) -> dict[str, Any]:
    method, name, before = METHODS[row["lineage"][-1]["kind"]], row["stage"], origin["stage"]
    main = max((case for case in ratios if case[0] == "image"), default=max(ratios))
    told = judged(ratios[main])
    faster = [case for case, found in ratios.items() if judged(found) == "faster"]
    figure = f"{name} is {in_words(ratios[main])} times as fast as {before} ({main[0]} tower, batch {main[1]})"
    smaller = origin["bytes"] / row["bytes"] if row.get("bytes") and origin.get("bytes") else 1.0
    keep: str | None = name if told == "faster" else before
    if told == "untold":
        keep = None
        advice = f"{ratios[main].rounds} rounds are too few to tell, {LEAST_ROUNDS} are needed: measure longer."
    elif told == "undecided":
        keep = None
        advice = "The machine was too noisy to tell: measure longer, or when it is quiet."
    elif told == "faster":
        others = [f"{tower} batch {batch}" for tower, batch in ratios if (tower, batch) not in faster]
        advice = f"Keep {name}." if not others else f"Keep {name}; at {', '.join(others)} it is not faster."
    else:
        others = [f"{tower} batch {batch}" for tower, batch in faster]
        advice = f"Keep {before}" + (f"; {name} is faster at {', '.join(others)}." if others else ".")
        if smaller > 1.1:
            advice += f" {name} is {smaller:.1f} times smaller, if size is what counts."
    head = {"faster": "is faster here", "slower": "is not faster here"}.get(told, "may or may not be faster here")
    return {
        "stage": name,
        "against": before,
        "method": method,
        "faster": {"faster": True, "slower": False}.get(told),
        "keep": keep,
        "text": f"{method} {head}: {figure}. {advice}",
        "cases": [
            {"tower": tower, "batch": batch, "speed_up": round(r.value, 4), **interval(r)}
            for (tower, batch), r in ratios.items()
        ],
    }


def judged(ratio: Ratio) -> str:
    """Return "faster", "slower" (not faster), "undecided" (noise could hide a gain), or "untold" (too few rounds)."""
    if ratio.low is None or ratio.high is None:
        return "untold"
    if ratio.low > 1 and ratio.value >= MATTERS:
        return "faster"
    return "undecided" if ratio.high > UNDECIDED else "slower"


def interval(ratio: Ratio) -> dict[str, float | None]:
    """Return the ends of the interval under the names results use."""
    ends = {"speed_up_low": ratio.low, "speed_up_high": ratio.high}
    return {name: None if end is None else round(end, 4) for name, end in ends.items()}


def in_words(ratio: Ratio) -> str:
    """Return a ratio and its interval as people read it."""
    return f"{ratio.value:.2f}" + ("" if ratio.low is None else f" [{ratio.low:.2f}, {ratio.high:.2f}]")
