"""Open ONNX files and run them on any CPU: `python session_job.py JOBS OUT`.

JOBS is a JSON list of {path, mode, inputs}, where inputs is an npz file and mode one of `open_session`'s, or openvino. OUT becomes {isa, saturates, jobs}, with a list of
{outputs | error, warnings, exact} in the order of JOBS; outputs is an npz file too.
"""

import json
import logging
import sys
from pathlib import Path

import numpy as np

from clipress.errors import ExportError
from clipress.runtime.cpu import processor
from clipress.runtime.onnx_session import open_session, runs_exactly


class Kept(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def opened(path, mode):
    if mode != "openvino":
        return open_session(path, 1, mode=mode)
    from clipress.runtime.openvino import open_openvino_session

    return open_openvino_session(path, 1)


def main(jobs, out):
    kept, done = Kept(), []
    logging.getLogger("clipress").addHandler(kept)
    for number, job in enumerate(json.loads(Path(jobs).read_text())):
        kept.lines.clear()
        try:
            session = opened(Path(job["path"]), job["mode"])
        except ExportError as error:
            done.append({"error": str(error), "warnings": list(kept.lines)})
            continue
        names = [put.name for put in session.get_outputs()]
        with np.load(job["inputs"]) as inputs:
            found = session.run(names, dict(inputs))
        outputs = f"{out}.{number}.npz"
        np.savez(outputs, **dict(zip(names, found, strict=True)))
        done.append(
            {
                "outputs": outputs,
                "warnings": list(kept.lines),
                "exact": job["mode"] != "openvino" and runs_exactly(session),
            }
        )
    Path(out).write_text(json.dumps({"isa": processor().isa, "saturates": processor().saturates, "jobs": done}))


if __name__ == "__main__":
    main(*sys.argv[1:])
