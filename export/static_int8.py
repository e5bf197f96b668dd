"""INT8 of a convolutional graph for ONNX Runtime on a CPU, with ONNX Runtime's static quantizer.

Its integer kernels for convolutions need uint8 activations on both sides of every convolution, including sums and ReLUs
between them, and folded batch norms. The graph with modelopt's quantizers has int8 in front of convolutions only, which
is what TensorRT needs but slower than float32 here. Weights round alike in both: symmetric int8, a scale per output
channel. Which file is faster depends on the network and the machine, so both are timed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from clipress.export import metadata, onnx_file
from clipress.runtime.graph import Arrays, Graph
from clipress.runtime.onnx_session import open_session

# Convolutional networks have these between convolutions; everything else stays in float32.
OPS = ["Conv", "Gemm", "MatMul", "Add", "Relu", "MaxPool", "GlobalAveragePool"]
BATCHES, ROUNDS = (1, 8), 15


def static_int8_from_onnx(source: Path, target: Path, batches: Iterable[Arrays], portable: bool = True) -> None:
    """Quantize all of a float32 graph; ONNX Runtime rounds the weights of excluded layers too, so none can be excluded.

    Args:
        source: the graph's file.
        target: the file to write.
        batches: real inputs by name, whose smallest and largest activations set the scales.
        portable: limit weights to -64 to 64, which overflow on no CPU.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Arrays] = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else dict(batch)

    with TemporaryDirectory(dir=target.parent, prefix=".") as aside, _quiet():
        folded = Path(aside) / "folded.onnx"
        quant_pre_process(source, folded, skip_symbolic_shape=True)
        quantize_static(
            folded,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=OPS,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=portable,
        )
    model = onnx_file.read(target)
    metadata.stamp_portable(model)
    onnx_file.write(model, target)


def milliseconds(files: Mapping[str, Path], graph: Graph) -> dict[str, float]:
    """Return the time per row of each file of a graph, over batches of 1 and 8: one thread, in turns, best of 15."""
    sessions = {name: open_session(path, threads=1) for name, path in files.items()}
    least: dict[tuple[str, int], float] = {}
    for _ in range(ROUNDS):
        for batch in BATCHES:
            for name, session in sessions.items():
                inputs = graph.example(batch)
                start = time.perf_counter()
                session.run(None, inputs)
                taken = (time.perf_counter() - start) * 1000 / batch
                least[name, batch] = min(taken, least.get((name, batch), taken))
    return {name: round(float(np.mean([least[name, batch] for batch in BATCHES])), 4) for name in files}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the root logger, on which the quantizer recommends what is already done, but not our own below it."""
    own = logging.getLogger("clipress")
    before, own_before = logging.root.level, own.level
    own.setLevel(own.getEffectiveLevel())
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(before)
        own.setLevel(own_before)
