"""Is INT8, is 2:4, faster on this machine? Said in one line each, with the artefact to keep.

A stage is compared with the one it was made from, in the same rounds. Faster means: the 95 % interval lies above 1 and the
ratio is at least 1.02: less is not worth an artefact, and where sessions could not be opened anew it may be luck (latency.py).
One that is faster is kept if no set loses more than `bench.max_loss` points by it.

results.json records what is kept, and `clipress serve` takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clipress.artifact import read_header
from clipress.bench.compare import LEAST_ROUNDS, Ratio
from clipress.errors import ArtifactError
from clipress.runtime.cpu import Processor
from clipress.storage import read_json

METHODS = {"quantize": "INT8", "sparsify": "2:4"}
MATTERS, UNDECIDED = 1.02, 1.10
FIGURES = ("/top1", "/text_r1", "/image_r1")  # of a set's accuracy, that a loss is looked for in
Case = tuple[str, int]


def verdicts(
    rows: Sequence[dict[str, Any]],
    cases: Sequence[Case],
    ratio: Callable[[str, str, Case], Ratio],
    max_loss: float,
    cpu: Processor | None = None,
) -> list[dict[str, Any]]:
    """Return a verdict per INT8 or 2:4 row whose origin was measured too.

    ratio: (origin, row, case) -> how many times as fast the row is. The last case of the image tower decides.
    max_loss: points of accuracy that what is kept may cost; nothing is known of it where no accuracy was measured.
    cpu: where it was measured, if on a CPU; what it lacks for INT8 is said.
    """
    told = []
    for row in rows:
        origin = _origin(row, rows)
        if origin is None or not cases:
            continue
        ratios = {case: ratio(origin["stage"], row["stage"], case) for case in cases}
        verdict = _verdict(row, origin, ratios, max_loss)
        if cpu is not None and (why := _about_cpu(row, verdict, cpu)):
            verdict["text"] += f" {why}"
        told.append(verdict)
    return told


def kept(rows: Sequence[dict[str, Any]], told: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return what is kept of the last artefact on each backend: itself, or what an INT8 or 2:4 that does not pay was put on.

    Where it could not be told, the recipe's choice stays. No entry where the last one is neither INT8 nor 2:4.
    """
    verdict_of, found = {one["stage"]: one for one in told}, []
    for backend in dict.fromkeys(row["backend"] for row in rows):
        own = {row["stage"]: row for row in rows if row["backend"] == backend}
        last = name = list(own)[-1]
        if last not in verdict_of:
            continue
        while name in verdict_of and verdict_of[name]["keep"] not in (None, name):
            name = verdict_of[name]["keep"]
        keep, asked = own[name], own[last]
        instead = "" if name == last else f", not {asked['artifact']} (to serve that: --stage {asked['artifact']})"
        found.append(
            {
                "backend": backend,
                "artifact": keep["artifact"],
                "hash": keep["lineage"][-1]["hash"],
                "of": asked["artifact"],
                "of_hash": asked["lineage"][-1]["hash"],
                "text": f"Kept on {backend}: {keep['artifact']}{instead}.",
            }
        )
    return found


def read_kept(results: Path, run: Path, last: str, backend: str = "onnxruntime") -> str | None:
    """Return the artefact that a run's results.json says is kept of its last one on a backend.

    None where nothing was measured, or artefacts that have been made anew since.
    """
    try:
        entries = read_json(results)["kept"]
        found = next(one for one in entries if (one["backend"], one["of"]) == (backend, last))
        asked = {found["of"]: found["of_hash"], found["artifact"]: found["hash"]}
        there = {name: read_header(run / name)["lineage"][-1]["hash"] for name in asked}
        return found["artifact"] if there == asked else None
    except (OSError, ValueError, LookupError, TypeError, StopIteration, ArtifactError):
        return None


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


def _verdict(row: dict[str, Any], origin: dict[str, Any], ratios: dict[Case, Ratio], max_loss: float) -> dict[str, Any]:
    method, name, before = METHODS[row["lineage"][-1]["kind"]], row["stage"], origin["stage"]
    main = max((case for case in ratios if case[0] == "image"), default=max(ratios))
    told = judged(ratios[main])
    faster = [case for case, found in ratios.items() if judged(found) == "faster"]
    figure = f"{name} is {in_words(ratios[main])} times as fast as {before} ({main[0]} tower, batch {main[1]})"
    smaller = origin["bytes"] / row["bytes"] if row.get("bytes") and origin.get("bytes") else 1.0
    loss, metric = largest_loss(row, origin) or (None, "")
    dear = loss is not None and loss > max_loss
    keep: str | None = name if told == "faster" and not dear else before
    if told == "untold":
        keep = None
        advice = f"{ratios[main].rounds} rounds are too few to tell, {LEAST_ROUNDS} are needed: measure longer."
    elif told == "undecided":
        keep = None
        advice = "The machine was too noisy to tell: measure longer, or when it is quiet."
    elif told == "faster" and dear:
        advice = f"Keep {before}: {name} loses {loss:.1f} points of {metric}, bench.max_loss allows {max_loss:g}."
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
        "loss": loss,
        "text": f"{method} {head}: {figure}. {advice}",
        "cases": [
            {"tower": tower, "batch": batch, "speed_up": round(r.value, 4), **interval(r)}
            for (tower, batch), r in ratios.items()
        ],
    }


def _about_cpu(row: dict[str, Any], verdict: dict[str, Any], cpu: Processor) -> str:
    """Say why INT8 is slow here, where the CPU or the form of the file is what makes it so."""
    if verdict["method"] != "INT8" or row["backend"] != "onnxruntime":
        return ""
    without = f"this CPU has no VNNI instructions ({' '.join(cpu.isa) or cpu.machine})"
    if row.get("exact_mode"):
        return (
            f"It ran in ONNX Runtime's exact mode, since it has 8-bit weights and {without}: quantize with portable: true "
            "to run at full speed."
        )
    return f"INT8 gains less here than elsewhere: {without}." if cpu.saturates and not verdict["faster"] else ""


def largest_loss(row: dict[str, Any], origin: dict[str, Any]) -> tuple[float, str] | None:
    """Return the most points a row loses against its origin in one of the sets' figures, and in which; None: not measured."""
    mine, theirs = row.get("accuracy", {}), origin.get("accuracy", {})
    losses = [(round(theirs[key] - mine[key], 3), key) for key in theirs if key.endswith(FIGURES) and key in mine]
    return max(losses, default=None)


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
