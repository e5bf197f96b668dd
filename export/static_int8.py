"""INT8 of a convolutional image tower for ONNX Runtime on a CPU, by its own static quantiser.

Its integer kernels for convolutions want uint8 activations on both sides of every convolution, sums and ReLUs between them
included, and batch norms folded first. The graph that modelopt's quantisers give has int8 in front of convolutions only: exact
for TensorRT, slower than float32 here. The weights round alike in both: symmetric int8, a scale per output channel.
Which of the two files is quicker depends on the network and the machine, so it is measured.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx

from clipress.export import metadata
from clipress.runtime.onnx_session import open_session

# what convolutional networks put between convolutions; everything else stays in float32
OPS = ["Conv", "Gemm", "MatMul", "Add", "Relu", "MaxPool", "GlobalAveragePool"]
BATCHES, ROUNDS = (1, 8), 15


def static_int8_from_onnx(source: Path, target: Path, pixels: Iterable[np.ndarray], portable: bool = True) -> None:
    """Quantise a float32 image tower, all of it: of a layer that is left out ONNX Runtime rounds the weights all the same.

    pixels: real pictures, batches of float32 [B, 3, S, S], whose smallest and largest activations set the scales.
    portable: weights from -64 to 64, which overflow on no CPU.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[np.ndarray] = iter(pixels)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {takes: batch}

    with TemporaryDirectory(dir=target.parent, prefix=".") as aside, _quiet():
        folded = Path(aside) / "folded.onnx"
        quant_pre_process(source, folded, skip_symbolic_shape=True)
        takes = onnx.load(folded).graph.input[0].name
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
    model = onnx.load(target)
    metadata.stamp_portable(model)
    onnx.save(model, target)


def milliseconds(files: Mapping[str, Path]) -> dict[str, float]:
    """Return what one picture takes with each file, the mean over batches of 1 and 8: one thread, in turns, least of 15."""
    sessions = {name: open_session(path, threads=1) for name, path in files.items()}
    least: dict[tuple[str, int], float] = {}
    for _ in range(ROUNDS):
        for batch in BATCHES:
            for name, session in sessions.items():
                takes = session.get_inputs()[0]
                pixels = np.zeros((batch, *takes.shape[1:]), np.float32)
                start = time.perf_counter()
                session.run(None, {takes.name: pixels})
                taken = (time.perf_counter() - start) * 1000 / batch
                least[name, batch] = min(taken, least.get((name, batch), taken))
    return {name: round(float(np.mean([least[name, batch] for batch in BATCHES])), 4) for name in files}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the root logger, on which the quantiser gives advice that was followed."""
    before = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(before)
