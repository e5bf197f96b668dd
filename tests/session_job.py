"""Open ONNX files and run them: `python session_job.py JOBS OUT`. Runs on whatever CPU it is started on.

JOBS is JSON, a list of {path, mode, inputs}, inputs an npz of the graph's; OUT becomes a list of {outputs | error, warnings,
exact}, outputs an npz beside the file of the inputs.
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


def main(jobs, out):
    kept, done = Kept(), []
    logging.getLogger("clipress").addHandler(kept)
    for number, job in enumerate(json.loads(Path(jobs).read_text())):
        kept.lines.clear()
        try:
            session = open_session(Path(job["path"]), 1, mode=job["mode"])
        except ExportError as error:
            done.append({"error": str(error), "warnings": list(kept.lines)})
            continue
        names = [put.name for put in session.get_outputs()]
        with np.load(job["inputs"]) as inputs:
            found = session.run(names, dict(inputs))
        outputs = f"{out}.{number}.npz"
        np.savez(outputs, **dict(zip(names, found, strict=True)))
        done.append({"outputs": outputs, "warnings": list(kept.lines), "exact": runs_exactly(session)})
    Path(out).write_text(json.dumps({"isa": processor().isa, "saturates": processor().saturates, "jobs": done}))


if __name__ == "__main__":
    main(*sys.argv[1:])
