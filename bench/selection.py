"""Does INT8 or 2:4 pay off on this machine? One line each, with the artifact to keep.

A row is compared with the one it was made from, in the same rounds. It is faster if the 95 % interval lies above 1 and the
ratio is at least 1.02: a smaller gain is not worth an artifact, and may be luck where sessions cannot be opened anew
(latency.py). A faster one is kept if no set loses more than `bench.max_accuracy_drop` points by it.

results.json records what is kept (`results.read_kept`), and `clipress serve` serves it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from clipress.bench.compare import LEAST_ROUNDS, Ratio
from clipress.bench.results import Case, CaseRatio, Kept, Row, Verdict
from clipress.runtime.cpu import Processor
from clipress.tasks import task_named

METHODS = {"quantize": "INT8", "sparsify": "2:4"}
MATTERS, UNDECIDED = 1.02, 1.10
SMALLER = 1.1  # times smaller: worth mentioning where a method is not faster


def verdicts(
    rows: Sequence[Row],
    cases: Sequence[Case],
    ratio: Callable[[str, str, Case], Ratio | None],
    max_accuracy_drop: float,
    cpu: Processor | None = None,
) -> list[Verdict]:
    """Return a verdict per INT8 or 2:4 row whose origin was measured too.

    Args:
        cases: what was timed; the largest batch of the task's main graph decides.
        ratio: (origin, row, case) -> how many times as fast the row is; None where they do not have the case's graph.
        max_accuracy_drop: points of accuracy that a faster row may lose and still be kept.
        cpu: the CPU of the measurement, if it was one; verdicts mention what it lacks for INT8.
    """
    found = []
    for row in rows:
        origin = _origin(row, rows)
        if origin is None:
            continue
        every = ((case, ratio(origin.stage, row.stage, case)) for case in cases)
        if ratios := {case: one for case, one in every if one is not None}:
            found.append(_verdict(_Comparison(row, origin, ratios), max_accuracy_drop, cpu))
    return found


def choose_kept(rows: Sequence[Row], found: Sequence[Verdict]) -> list[Kept]:
    """Return what to keep of the last artifact on each backend: itself, or its origin if INT8 or 2:4 does not pay off.

    The recipe's choice stands where the measurement cannot tell. There is no entry if the last artifact is neither INT8
    nor 2:4.
    """
    verdict_of, kept = {one.stage: one for one in found}, []
    for backend in dict.fromkeys(row.backend for row in rows):
        own = {row.stage: row for row in rows if row.backend == backend}
        last = name = list(own)[-1]
        if last not in verdict_of:
            continue
        while name in verdict_of and verdict_of[name].keep not in (None, name):
            name = verdict_of[name].keep
        keep, of = own[name], own[last]
        instead = "" if name == last else f", not {of.artifact} (to serve that: --stage {of.artifact})"
        kept.append(
            Kept(
                backend=backend,
                artifact=keep.artifact,
                hash=keep.hash,
                of=of.artifact,
                of_hash=of.hash,
                text=f"Kept on {backend}: {keep.artifact}{instead}.",
            )
        )
    return kept


def _origin(row: Row, rows: Sequence[Row]) -> Row | None:
    """Return the measured row, on the same backend, that an INT8 or 2:4 row was made from."""
    if not row.lineage or row.lineage[-1].kind not in METHODS:
        return None
    made = {other.hash: other for other in rows if other is not row and other.lineage and other.backend == row.backend}
    earlier = (made.get(record.hash) for record in reversed(row.lineage[:-1]))
    return next((found for found in earlier if found is not None), None)


@dataclass(frozen=True)
class _Comparison:
    """One row against the one it was made from."""

    row: Row
    origin: Row
    ratios: Mapping[Case, Ratio]

    @property
    def method(self) -> str:
        return METHODS[self.row.lineage[-1].kind]

    @property
    def main(self) -> Case:
        """The case that decides."""
        graph = task_named(self.row.task).main_graph
        return max((case for case in self.ratios if case.graph == graph), default=max(self.ratios))

    @property
    def faster(self) -> list[Case]:
        return [case for case, ratio in self.ratios.items() if judge(ratio) == "faster"]

    @property
    def times_smaller(self) -> float:
        return self.origin.bytes / self.row.bytes if self.row.bytes and self.origin.bytes else 1.0


def _verdict(pair: _Comparison, max_accuracy_drop: float, cpu: Processor | None) -> Verdict:
    row, origin, main = pair.row, pair.origin, pair.main
    judgement = judge(pair.ratios[main])
    loss, metric = largest_loss(row, origin) or (None, "")
    costly = loss is not None and loss > max_accuracy_drop
    if judgement == "faster" and costly:
        advice = f"Keep {origin.stage}: {row.stage} loses {loss:.1f} points of {metric}, bench.max_accuracy_drop allows {max_accuracy_drop:g}."
    else:
        advice = _advice(pair, judgement)
    head = {"faster": "is faster here", "slower": "is not faster here"}.get(judgement, "may or may not be faster here")
    figure = f"{row.stage} is {in_words(pair.ratios[main])} times as fast as {origin.stage} ({main})"
    faster = {"faster": True, "slower": False}.get(judgement)
    why = _about_cpu(pair, faster, cpu) if cpu is not None else ""
    return Verdict(
        stage=row.stage,
        against=origin.stage,
        method=pair.method,
        faster=faster,
        keep=None if faster is None else row.stage if faster and not costly else origin.stage,
        loss=loss,
        text=f"{pair.method} {head}: {figure}. {advice}{why}",
        cases=[
            CaseRatio(
                tower=case.graph, batch=case.batch, ids=case.ids, speed_up=round(ratio.value, 4), **interval(ratio)
            )
            for case, ratio in pair.ratios.items()
        ],
    )


def _advice(pair: _Comparison, judgement: str) -> str:
    row, origin = pair.row.stage, pair.origin.stage
    if judgement == "unknown":
        rounds = pair.ratios[pair.main].rounds
        return f"{rounds} rounds are too few to tell, {LEAST_ROUNDS} are needed: measure longer."
    if judgement == "undecided":
        return "The machine was too noisy to tell: measure longer, or when it is quiet."
    if judgement == "faster":
        others = [f"{case.graph} {case.size}" for case in pair.ratios if case not in pair.faster]
        return f"Keep {row}; at {', '.join(others)} it is not faster." if others else f"Keep {row}."
    others = [f"{case.graph} {case.size}" for case in pair.faster]
    advice = f"Keep {origin}; {row} is faster at {', '.join(others)}." if others else f"Keep {origin}."
    if pair.times_smaller > SMALLER:
        advice += f" {row} is {pair.times_smaller:.1f} times smaller, if size is what counts."
    return advice


def _about_cpu(pair: _Comparison, faster: bool | None, cpu: Processor) -> str:
    """Explain why INT8 is slow here, if the CPU or the form of the file is the reason."""
    if pair.method != "INT8" or pair.row.backend != "onnxruntime":
        return ""
    without = f"this CPU has no VNNI instructions ({' '.join(cpu.isa) or cpu.machine})"
    if pair.row.exact_mode:
        return (
            f" It ran in ONNX Runtime's exact mode, since it has 8-bit weights and {without}: quantize with portable: true "
            "to run at full speed."
        )
    return f" INT8 gains less here than elsewhere: {without}." if cpu.saturates and not faster else ""


def largest_loss(row: Row, origin: Row) -> tuple[float, str] | None:
    """Return the most points that a row loses in any of its task's figures, and in which; None: not measured."""
    figures = task_named(row.task).figures
    losses = [
        (round(before - row.accuracy[key], 3), key)
        for key, before in origin.accuracy.items()
        if key.endswith(figures) and key in row.accuracy
    ]
    return max(losses, default=None)


def judge(ratio: Ratio) -> str:
    """Return "faster", "slower" (not faster), "undecided" (noise could hide a gain), or "unknown" (too few rounds)."""
    if ratio.low is None or ratio.high is None:
        return "unknown"
    if ratio.low > 1 and ratio.value >= MATTERS:
        return "faster"
    return "undecided" if ratio.high > UNDECIDED else "slower"


def interval(ratio: Ratio) -> dict[str, float | None]:
    """Return the ends of the interval, by their names in results.json."""
    ends = {"speed_up_low": ratio.low, "speed_up_high": ratio.high}
    return {name: None if end is None else round(end, 4) for name, end in ends.items()}


def in_words(ratio: Ratio) -> str:
    """Return a ratio and its interval as text."""
    return f"{ratio.value:.2f}" + ("" if ratio.low is None else f" [{ratio.low:.2f}, {ratio.high:.2f}]")
