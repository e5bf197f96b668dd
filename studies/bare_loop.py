"""Compare the medians of clipress with those of a bare loop. `python studies/bare_loop.py EXPORT [BATCH] [ROUNDS]`.

The bare loop is a separate program that does not import clipress, only numpy, onnxruntime and a clock. Both programs stay
open and measure in turns, in alternating order, so that a noisy machine disturbs both alike. Prints the two medians, their
ratio round by round (median and quartiles), and the machine's load.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

BARE = """
import sys, time, numpy, onnxruntime
path, batch = sys.argv[1] + "/image.onnx", int(sys.argv[2])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
takes = session.get_inputs()[0]
pixels = numpy.random.default_rng(0).standard_normal((batch, *takes.shape[1:]), dtype=numpy.float32)
def measure():
    times, until = [], time.perf_counter() + 1
    while time.perf_counter() < until:
        start = time.perf_counter()
        session.run(None, {takes.name: pixels})
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] * 1000
"""
OURS = """
import sys
from pathlib import Path
from clipress.bench.latency import measure_in_turns, summary
from clipress.bench.runners.onnxruntime import OnnxRuntimeRunner
batch = int(sys.argv[2])
query = OnnxRuntimeRunner(Path(sys.argv[1]), 1).query("image", batch)
def measure():
    found = measure_in_turns({"a": query}, warm_up_ms=0, duration_ms=1000, iterations=1)
    return summary(found["a"], batch)["median_ms"]
"""
ANSWER = """
measure()
for line in sys.stdin:
    print(measure(), flush=True)
"""


def main(export: str, batch: str = "8", rounds: str = "15") -> None:
    """Run both in turns and print the result."""
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", text + ANSWER, export, batch],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for text in (BARE, OURS)
    ]
    medians: list[list[float]] = [[], []]
    for number in range(int(rounds)):
        for which in (0, 1) if number % 2 else (1, 0):
            programs[which].stdin.write("\n")
            programs[which].stdin.flush()
            medians[which].append(float(programs[which].stdout.readline()))
    for program in programs:
        program.stdin.close()
        program.wait()
    low, middle, high = statistics.quantiles([ours / bare for bare, ours in zip(*medians, strict=True)], n=4)
    bare, ours = (statistics.median(found) for found in medians)
    sys.stdout.write(
        f"bare {bare:.4f} ms, clipress {ours:.4f} ms, batch {batch}; ours / bare over {rounds} rounds: {middle:.4f} "
        f"(quartiles {low:.4f} to {high:.4f}); best rounds {min(medians[1]) / min(medians[0]):.4f}; "
        f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
