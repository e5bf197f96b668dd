"""Compare two implementations of a model's graphs on real samples; a file that does not agree is not written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipress.data.eval_sets import EvalSet, on_readable
from clipress.errors import ExportError
from clipress.memory import release_memory
from clipress.models import quantizers
from clipress.models.load import Model
from clipress.runtime.export_folder import Exported
from clipress.runtime.graph import Arrays, Graph, Run
from clipress.runtime.onnx_session import run_from_onnx
from clipress.tasks import graphs_of, runs_of, task_named


class Limits(NamedTuple):
    """Limits on the difference between a candidate and its reference."""

    least_cosine: float
    same_first: float
    """Least fraction of queries with the same first place."""
    equal: float
    """Scores that differ by less count as equal: of cosines, or of logits divided by a row's range."""
    mean_cosine: float = 0.0


# INT8 is compared with torch running the same quantizers, so only rounding differs. Where a value lies between two levels the two
# may round apart, which a narrow tower shows in single samples but not on average; in a deep one, one such value moves others over
# their borders, until the two differ by as much as either does from the model without rounding, which is then the mean's limit; and
# scores that are closer than this rounding moves them count as equal.
# ONNX Runtime's own quantization rounds in more places. A float16 file is compared with the float32 one, an engine with ONNX
# Runtime on the file it was built from.
LIMITS = {
    "fp32": Limits(0.9999, 1.0, 1e-5),
    "int8": Limits(0.995, 0.95, 5e-3, mean_cosine=0.999),
    "static int8": Limits(0.99, 0.95, 2e-2),
    "fp16": Limits(0.999, 0.97, 5e-3),
    "int8-fp16": Limits(0.99, 0.95, 2e-2),
    "fp32 engine": Limits(0.9999, 0.99, 1e-3),  # TensorRT computes float32 as TF32.
    "fp16 engine": Limits(0.999, 0.97, 5e-3),
    "bf16 engine": Limits(0.99, 0.95, 2e-2),
    "int8 engine": Limits(0.99, 0.95, 2e-2),
}
BATCHES = (1, 3)  # Compared in addition to all samples.
AT_ONCE = 32  # The largest batch: a deep tower's activations for all samples would take more memory than its weights.


@dataclass(frozen=True)
class Comparison:
    """The inputs, and the limits, of a comparison of two implementations."""

    graphs: Mapping[str, Graph]
    samples: Mapping[str, Arrays]
    """Real inputs of every graph."""
    precision: str
    """A key of LIMITS."""
    names: Mapping[str, str]
    """The name of each graph's candidate in messages."""
    batches: Sequence[int] = BATCHES
    unquantized: Mapping[str, Run] | None = None
    """The reference without its quantizers, which says how much a model is changed by rounding at all."""

    @property
    def limits(self) -> Limits:
        """The limits of the precision."""
        return limits_of(self.precision)


def limits_of(precision: str) -> Limits:
    """Return the limits of a precision."""
    return Limits(*LIMITS[precision])


def check(model: Model, folder: Path, samples: Mapping[str, Arrays], precision: str) -> dict[str, Any]:
    """Compare `<graph>.onnx` in a folder with torch, graph by graph. Returns the figures; raises ExportError."""
    graphs, runs = graphs_of(model), runs_of(model)
    names = {name: f"{name}.onnx" for name in graphs}
    plain = {name: _without_quantizers(model, run) for name, run in runs.items()} if model.quantization else None
    what = Comparison(graphs, samples, precision, names, unquantized=plain)
    figures = compare(
        what, runs, Openers({name: partial(run_from_onnx, folder / file) for name, file in names.items()})
    )
    sizes = {name: _count(samples[name]) for name in graphs}
    return {"samples": sizes, "batches": [*BATCHES, AT_ONCE], **figures}


def samples_from_export(exported: Exported, sets: Sequence[EvalSet]) -> dict[str, Arrays]:
    """Return real inputs of an export's graphs; what its own graphs compute is computed by ONNX Runtime."""
    task = task_named(exported.task)
    files = Openers({name: partial(run_from_onnx, exported.onnx(name)) for name in exported.graphs})
    samples = on_readable(lambda good: task.samples(good, exported.preprocess, exported.tokenize()), sets)
    return task.completed(samples, files)


class Openers(dict[str, Callable[[], Run]]):
    """Graphs as functions, each opened when it is required: a large one is in memory only while it is compared."""

    def __getitem__(self, graph: str) -> Run:
        return super().__getitem__(graph)()


def _rows(run: Run, inputs: Arrays) -> dict[str, np.ndarray]:
    """Run a graph on all rows, some at a time."""
    starts = range(0, _count(inputs), AT_ONCE)
    parts = [run({key: rows[start : start + AT_ONCE] for key, rows in inputs.items()}) for start in starts]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _without_quantizers(model: Model, run: Run) -> Run:
    names = model.quantization["modules"]

    def plain(inputs: Arrays) -> dict[str, np.ndarray]:
        quantizers.only(model.module, names, ())
        try:
            return run(inputs)
        finally:
            quantizers.only(model.module, names, names)

    return plain


def compare(what: Comparison, reference: Mapping[str, Run], candidate: Mapping[str, Run]) -> dict[str, float]:
    """Compare the rows of every graph, then first places: of logits, of every patch, and of rankings between two graphs of embeddings.

    Candidates run on all samples, up to AT_ONCE in a batch, and on the first ones in `batches`, whose texts lose the
    padding that is not read.
    Returns the figures; raises ExportError when one is beyond the limits of the precision.
    """
    figures, embeddings = {}, {}
    for name, graph in what.graphs.items():
        wanted = _rows(reference[name], what.samples[name])  # before the candidate is opened
        run = candidate[name]
        found = _rows(run, what.samples[name])
        figures[f"{name}_min_cosine"] = _least_cosine(what, name, run, wanted, found)
        del run
        release_memory()
        first = graph.outputs[0].name
        if graph.agrees == "logits":
            same = same_class(wanted[first], found[first], what.limits.equal)
            figures[f"{name}_same_first_place"] = _enough(what, [name], same)
        elif graph.agrees == "masks":  # [N, C, rows, columns]
            same = same_class(*(np.moveaxis(rows[first], 1, -1) for rows in (wanted, found)), what.limits.equal)
            figures[f"{name}_same_first_place"] = _enough(what, [name], same)
        elif wanted[first].ndim == 2:
            embeddings[name] = (wanted[first], found[first])
    if len(embeddings) == 2 and len({wanted.shape[1] for wanted, _ in embeddings.values()}) == 1:
        wanted, found = zip(*embeddings.values(), strict=True)
        same = same_first(wanted, found, what.limits.equal)
        if same < what.limits.same_first and what.unquantized is not None:
            same = same_first(wanted, found, max(what.limits.equal, _moved_by_rounding(what, embeddings)))
        figures["same_first_place"] = _enough(what, list(embeddings), same)
    return figures


def compare_outputs(
    reference: Callable[[], Run],
    candidate: Callable[[], Run],
    cases: Sequence[Arrays],
    limits: Mapping[str, float],
    name: str,
) -> dict[str, float]:
    """Compare a file with the files it was made from, output by output. Both are given as what opens them, and opened in turn.

    `limits` are the largest allowed differences. Returns those found; raises ExportError when one is beyond its limit.
    """
    figures: dict[str, float] = {}
    for expected, found in zip(_answers(reference, cases), _answers(candidate, cases), strict=True):
        for output, wanted in expected.items():
            if wanted.shape != found[output].shape:
                raise ExportError(
                    f"{name}: expected {output} of shape {wanted.shape}, found {found[output].shape}: its batch is not "
                    "dynamic. Nothing was written."
                )
            difference = float(np.abs(wanted - found[output]).max())
            if not difference <= limits[output]:  # NaN fails too.
                raise ExportError(
                    f"{name}: {output} differs from the source model by {difference:.2g} (limit {limits[output]:.2g}). "
                    "Nothing was written."
                )
            key = f"{output}_max_difference"
            figures[key] = max(figures.get(key, 0.0), difference)
    return figures


def _answers(open_run: Callable[[], Run], cases: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
    run = open_run()
    answers = [run(case) for case in cases]
    del run
    release_memory()
    return answers


def same_first(wanted: Sequence[np.ndarray], found: Sequence[np.ndarray], equal: float) -> float:
    """Return the fraction of queries, in both directions, whose first place is the same up to equal scores.

    wanted, found: embeddings of both sides, [N, D] and [M, D].
    """
    truth, other = wanted[0] @ wanted[1].T, found[0] @ found[1].T
    same = []
    for scores, ranked in ((truth, other), (truth.T, other.T)):
        chosen = scores[np.arange(len(scores)), ranked.argmax(1)]
        same.append(scores.max(1) - chosen <= equal)
    return float(np.concatenate(same).mean())


def same_class(wanted: np.ndarray, found: np.ndarray, equal: float) -> float:
    """Return the fraction of rows of logits [..., C] whose largest is the same up to equal scores."""
    wanted, found = (logits.reshape(-1, logits.shape[-1]) for logits in (wanted, found))
    chosen = wanted[np.arange(len(wanted)), found.argmax(1)]
    return float((wanted.max(1) - chosen <= equal * np.ptp(wanted, axis=1)).mean())


def _least_cosine(
    what: Comparison, name: str, run: Run, wanted: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]
) -> float:
    """Return the least cosine over all outputs and batch sizes. Raises ExportError when it is too low."""
    inputs, limits = what.samples[name], what.limits
    cosines = [_cosines(wanted[output], found[output]) for output in wanted]
    for batch in what.batches:
        part = run(what.graphs[name].needed({key: rows[:batch] for key, rows in inputs.items()}))
        for output, rows in wanted.items():
            if part[output].shape != rows[:batch].shape:
                raise ExportError(
                    f"{what.names[name]}: expected {output} of shape {rows[:batch].shape} for a batch of {batch}, "
                    f"found {part[output].shape}: its batch is not dynamic. Nothing was written."
                )
            cosines.append(_cosines(rows[:batch], part[output]))
    every = np.concatenate(cosines)
    least, mean = (
        float(np.min(every)),
        float(np.mean(every)),
    )  # NaN if any is; Python's min would drop one that is not the first.
    mean_limit = limits.mean_cosine
    if mean < mean_limit and what.unquantized is not None:
        plain = _rows(what.unquantized[name], inputs)
        changed = 1 - np.mean([_cosines(rows, plain[output]).mean() for output, rows in wanted.items()])
        mean_limit = min(mean_limit, 1 - float(changed))
    for kind, cosine, limit in (("least", least, limits.least_cosine), ("mean", mean, mean_limit)):
        if not cosine >= limit:  # NaN fails too.
            raise ExportError(
                f"{what.names[name]} does not agree with the model it came from: {kind} cosine {cosine:.6f} on "
                f"{_count(inputs)} samples, at least {limit:.5g} is required at {what.precision}. Nothing was written."
            )
    return least


def _enough(what: Comparison, graphs: Sequence[str], same: float) -> float:
    """Return the fraction of equal first places. Raises ExportError when it is too low."""
    required = what.limits.same_first
    if not same >= required:
        names = [what.names[graph] for graph in graphs]
        raise ExportError(
            f"{' and '.join(names)} {'rank' if len(names) > 1 else 'ranks'} differently from the model: the first "
            f"place is the same for {same:.1%} of the queries, at least {required:.0%} is required at "
            f"{what.precision}. Nothing was written."
        )
    return same


def _moved_by_rounding(what: Comparison, embeddings: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> float:
    """Return how far the model's own rounding moves two scores apart: √2 times the root mean square of what it does to one."""
    plain = [
        _rows(what.unquantized[name], what.samples[name])[what.graphs[name].outputs[0].name] for name in embeddings
    ]
    wanted = [rows for rows, _ in embeddings.values()]
    return float(np.sqrt(2 * np.mean((wanted[0] @ wanted[1].T - plain[0] @ plain[1].T) ** 2)))


def _count(inputs: Arrays) -> int:
    return len(next(iter(inputs.values())))


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (rows.reshape(len(rows), -1) for rows in (a, b))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.maximum(norms, 1e-12)
