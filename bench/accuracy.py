"""Accuracy through a runner: the same metrics training uses, on what will really be shipped."""

from __future__ import annotations

from collections.abc import Sequence

from clipress.bench.runners.onnxruntime import OnnxRuntimeRunner
from clipress.data.evalsets import EvalSet
from clipress.data.tokens import tokenizer_from_spec
from clipress.metrics.evaluate import evaluate


def accuracy(runner: OnnxRuntimeRunner, sets: Sequence[EvalSet]) -> dict[str, float]:
    """Return `{"<set>/<metric>": percent}` with the preprocessing and tokenizer the export names."""
    tokenize = tokenizer_from_spec(runner.exported.tokenizer.model_dump())
    return evaluate(runner.encode("image"), runner.encode("text"), sets, runner.exported.preprocess, tokenize)


def standard_errors(results: dict[str, float], sets: Sequence[EvalSet]) -> dict[str, float]:
    """Return each percentage's binomial standard error in points: sqrt(p (100 - p) / n)."""
    queries: dict[str, int] = {}
    for evalset in sets:
        texts = 0 if evalset.classes else len(evalset.texts()[0])
        queries |= {
            f"{evalset.name}/{kind}": n
            for kind, n in (("top", len(evalset.source)), ("text_r", len(evalset.source)), ("image_r", texts))
        }
    return {key: (value * (100 - value) / queries[key.rstrip("0123456789")]) ** 0.5 for key, value in results.items()}
