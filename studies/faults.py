"""Results of kills, hostile inputs, fuzzing and abuse of the server: `python studies/faults.py PARTS`.

PARTS is a folder with the results of each program: faults_kills.json (tests/flow/kill_jobs.py), faults_inputs.json
(tests/faults.py), faults_fuzz.json (tests/fuzz/, by hand from libFuzzer's output) and faults_serving.json (tests of the
real Triton). Writes faults.json and faults.md beside this file.
"""

from __future__ import annotations

import json
import platform
import sys
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

from clipress.runtime.cpu import processor

HERE = Path(__file__).parent


def cell(text: Any) -> str:
    """Return a text as a cell of a table; characters that cannot be printed are escaped."""
    seen = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in " ".join(str(text).split()))
    return seen.replace("|", "\\|")


def table(names: list[str], rows: list[list[Any]]) -> list[str]:
    """Return a table's lines."""
    lines = [names, ["---"] * len(names), *rows]
    return ["| " + " | ".join(cell(value) for value in line) + " |" for line in lines]


def kills(part: dict[str, Any]) -> list[str]:
    """Count, per stage, the kills that found a process alive, and those that lost something."""
    counted, lost = Counter(), Counter()
    for row in part["kills"]:
        counted[row["stage"]] += sum(not moment.startswith("not killed") for moment in row["killed at"])
        lost[row["stage"]] += not row["bit-exact"]
    total, losses = sum(counted.values()), sum(lost.values())
    rows = [[stage, count, lost[stage]] for stage, count in counted.items()]
    return [
        f"SIGKILL at a step, right after a change on the disk, or at any moment; {total} kills, {losses} losses. The result "
        "is compared byte by byte with that of an uninterrupted run.",
        "",
        *table(["stage", "kills", "lost"], rows),
    ]


def inputs(part: list[dict[str, Any]]) -> list[str]:
    """List every input and what happened."""
    passed = sum(row["passed"] for row in part)
    return [
        f"{len(part)} inputs, {passed} as expected; each with at most 1 GiB more address space.",
        "",
        *table(["input", "what happened"], [[row["input"], row["happened"]] for row in part]),
    ]


def fuzz(part: dict[str, Any]) -> list[str]:
    """List targets with their executions."""
    keys = ["target", "seconds", "cpu_seconds", "executions"]
    rows = [[*(row[key] for key in keys), "; ".join(row["findings"]) or "none"] for row in part["rows"]]
    return [part["tool"] + ".", "", *table(["target", "seconds", "processor seconds", "executions", "findings"], rows)]


def serving(part: list[dict[str, Any]]) -> list[str]:
    """List what was done to the server, what was expected and what happened."""
    keys = ["fault", "expected", "happened"]
    return [
        "Against a real Triton. After each fault, a good request is answered as before.",
        "",
        *table(keys, [[row[key] for key in keys] for row in part]),
    ]


def markdown(results: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    known = results["conditions"]
    lines = [
        "# Faults: what was done, and what happened",
        "",
        f"`python studies/{Path(__file__).name}`, {known['date']}, {known['processor']}, {known['cores']} cores, "
        f"Python {known['python']}.",
    ]
    for part, (title, section) in PARTS.items():
        lines += ["", f"## {title}", "", *section(results[part])]
    return "\n".join(lines) + "\n"


PARTS = {
    "kills": ("Kills", kills),
    "inputs": ("Inputs", inputs),
    "fuzz": ("Fuzzing", fuzz),
    "serving": ("The server", serving),
}


def main(folder: str) -> None:
    """Read the parts, write the study."""
    conditions = {"date": date.today().isoformat(), "python": platform.python_version(), **processor().record()}
    parts = {name: json.loads((Path(folder) / f"faults_{name}.json").read_text(encoding="utf-8")) for name in PARTS}
    results = {"conditions": conditions, **parts}
    (HERE / "faults.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (HERE / "faults.md").write_text(markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
