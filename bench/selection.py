"""Does INT8 or 2:4 pay off on this machine, and which runtime is faster? One line each, with what to keep.

A row is compared with the one it was made from, in the same rounds. It is faster if the 95 % interval lies above 1 and the
ratio is at least 1.02: a smaller gain is not worth an artifact, and may be luck where sessions cannot be opened anew
(latency.py). A faster one is kept if no set loses more than `bench.max_accuracy_drop` points by it. Where the interval
includes 1, no difference was seen: the simpler row is kept, or the recipe's choice if the interval is wide.

Where several runtimes were measured, what each keeps is compared in the same way with what the first one keeps.
results.json records all of it, and commands that take a run follow it (`results.read_kept`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from clipress.bench.compare import LEAST_ROUNDS, Ratio, includes_no_difference
from clipress.bench.results import Case, CaseRatio, Kept, Row, Verdict
from clipress.runtime.cpu import Processor
from clipress.runtime.sessions import RUNTIMES
from clipress.tasks import task_named

METHODS = {"quantize": "INT8", "sparsify": "2:4"}
HEADS = {
    "faster": " is faster here",
    "slower": " is not faster here",
    "same": ", no difference seen here",
    "undecided": ", no difference seen here",
    "unknown": " may or may not be faster here",
}
"""What a verdict says of a method, by judgement."""
MATTERS, UNDECIDED = 1.02, 1.10
Compare = Callable[[str, str, Case], Ratio | None]
SMALLER = 1.1  # times smaller: worth mentioning where a method is not faster


def verdicts(
    rows: Sequence[Row],
    cases: Sequence[Case],
    ratio: Compare,
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
        pair = _Comparison(row, origin, METHODS[row.lineage[-1].kind], _ratios(row, origin, cases, ratio))
        if pair.ratios:
            found.append(_verdict(pair, max_accuracy_drop, cpu))
    return found


def _ratios(row: Row, origin: Row, cases: Sequence[Case], ratio: Compare) -> dict[Case, Ratio]:
    every = ((case, ratio(origin.stage, row.stage, case)) for case in cases)
    return {case: one for case, one in every if one is not None}


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
        seen = {True: "", False: "", None: "; no difference seen"}[verdict_of[last].faster]
        kept.append(_kept(keep, of, f"{instead}{seen}"))
    return kept


def _kept(keep: Row, of: Row, more: str = "") -> Kept:
    return Kept(
        backend=keep.backend,
        artifact=keep.artifact,
        hash=keep.hash,
        of=of.artifact,
        of_hash=of.hash,
        text=f"Kept on {keep.backend}: {keep.artifact}{more}.",
    )


def choose_runtime(
    rows: Sequence[Row], kept: Sequence[Kept], cases: Sequence[Case], ratio: Compare, max_accuracy_drop: float
) -> tuple[list[Verdict], list[Kept]]:
    """Compare what the runtimes keep, if several were measured. Returns verdicts, and what is kept with the runtime to use.

    Arguments as for `verdicts`; `kept` is what `choose_kept` returned. Of runtimes without a difference the first is used.
    """
    last = {row.backend: row for row in rows if row.backend in RUNTIMES and row.hash}
    if len(last) < 2:
        return [], list(kept)
    chosen = {one.backend: one for one in kept} | {
        backend: _kept(row, row) for backend, row in last.items() if backend not in {one.backend for one in kept}
    }
    own = {
        backend: next(row for row in rows if (row.backend, row.hash) == (backend, chosen[backend].hash))
        for backend in last
    }
    best, *others = own.values()
    found = []
    for other in others:
        pair = _Comparison(other, best, other.backend, _ratios(other, best, cases, ratio), "the first one")
        if pair.ratios:
            found.append(_verdict(pair, max_accuracy_drop, None))
            best = other if found[-1].keep == other.stage else best
    return found, [one.model_copy(update={"preferred": one.backend == best.backend}) for one in chosen.values()]


def _origin(row: Row, rows: Sequence[Row]) -> Row | None:
    """Return the measured row, on the same backend, that an INT8 or 2:4 row was made from."""
    if not row.lineage or row.lineage[-1].kind not in METHODS:
        return None
    made = {other.hash: other for other in rows if other is not row and other.lineage and other.backend == row.backend}
    earlier = (made.get(record.hash) for record in reversed(row.lineage[:-1]))
    return next((found for found in earlier if found is not None), None)


@dataclass(frozen=True)
class _Comparison:
    """One row against the one it was made from, or against the same on the first runtime."""

    row: Row
    origin: Row
    method: str
    """What the row has and the origin has not, in words."""
    ratios: Mapping[Case, Ratio]
    rank: str = "the simpler one"
    """What the origin is of the two."""

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
    head = HEADS[judgement]
    figure = f"{row.stage} is {in_words(pair.ratios[main])} times as fast as {origin.stage} ({main})"
    faster = {"faster": True, "slower": False}.get(judgement)
    why = _about_cpu(pair, faster, cpu) if cpu is not None else ""
    keep = None if judgement in ("undecided", "unknown") else row.stage if faster and not costly else origin.stage
    return Verdict(
        stage=row.stage,
        against=origin.stage,
        method=pair.method,
        faster=faster,
        keep=keep,
        loss=loss,
        text=f"{pair.method}{head}: {figure}. {advice}{why}",
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
        stays = origin if pair.method in RUNTIMES else row
        return f"The machine was too noisy to see one: measure longer, or when it is quiet. Until then {stays} stays."
    if judgement == "faster":
        others = [f"{case.graph} {case.size}" for case in pair.ratios if case not in pair.faster]
        return f"Keep {row}; at {', '.join(others)} it is not faster." if others else f"Keep {row}."
    others = [f"{case.graph} {case.size}" for case in pair.faster]
    keep = f"Keep {origin}, {pair.rank}" if judgement == "same" else f"Keep {origin}"
    advice = f"{keep}; {row} is faster at {', '.join(others)}." if others else f"{keep}."
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
    """Return a key of HEADS.

    "slower" includes gains too small to matter; without a difference it is "same", or "undecided" if noise could hide a gain.
    """
    if ratio.low is None or ratio.high is None:
        return "unknown"
    if includes_no_difference(ratio.low, ratio.high):
        return "undecided" if ratio.high > UNDECIDED else "same"
    return "faster" if ratio.low > 1 and ratio.value >= MATTERS else "slower"


def interval(ratio: Ratio) -> dict[str, float | None]:
    """Return the ends of the interval, by their names in results.json."""
    ends = {"speed_up_low": ratio.low, "speed_up_high": ratio.high}
    return {name: None if end is None else round(end, 4) for name, end in ends.items()}


def in_words(ratio: Ratio) -> str:
    """Return a ratio and its interval as text."""
    return f"{ratio.value:.2f}" + ("" if ratio.low is None else f" [{ratio.low:.2f}, {ratio.high:.2f}]")
