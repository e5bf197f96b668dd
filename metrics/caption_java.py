"""METEOR (Denkowski and Lavie 2014) and SPICE (Anderson et al. 2016) of captions, by their authors' Java programs.

pycocoevalcap brings both programs (`clipress[captions]`); they run as it runs them, where `java` is on PATH. METEOR adds up statistics of all
images and scores their sum, which is not the mean of the images' scores: an image's outcome is its own score, moved by their difference. SPICE is the mean of every image's F-score. It also needs Stanford's
CoreNLP 3.6.0, which pycocoevalcap fetches when it first computes SPICE, and a Java that has a JavaScript engine, 8 to 14.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import numpy as np

from clipress.metrics.outcomes import Outcomes
from clipress.storage import cache_folder

log = logging.getLogger("clipress.metrics")

PACKAGE = "pycocoevalcap"
METEOR, SPICE = "meteor/meteor-1.5.jar", "spice/spice-1.0.jar"
CORENLP = ("spice/lib/stanford-corenlp-3.6.0.jar", "spice/lib/stanford-corenlp-3.6.0-models.jar")
LAST_JAVA = 14  # SPICE writes its file with a JavaScript engine, which later ones lack

Texts = Sequence[str]
Score = Callable[[Path, Texts, Sequence[Texts]], np.ndarray]


class ProgramFailed(Exception):
    """A program that ended without an answer; the message is the last that it said."""


def scores_by_java(captions: Texts, references: Sequence[Texts]) -> dict[str, Outcomes]:
    """Return `meteor` and `spice` of a caption per image, words separated by blanks; those that cannot be computed here are left out.

    What is missing is logged once. A program that fails is logged, and its figure is left out.
    """
    found = {}
    for name, program in find_programs().items():
        try:
            found[name] = Outcomes(SCORES[name](program, captions, references))
        except ProgramFailed as error:
            log.warning("%s of captions is left out: %s failed: %s", name.upper(), program, error)
    return found


@cache
def find_programs() -> dict[str, Path]:
    """Return the programs that can run here, and say once what the others lack."""
    spec = find_spec(PACKAGE)  # found without importing it, which would import pycocotools
    folders = [Path(one) for one in (spec.submodule_search_locations or ())] if spec else []
    java = shutil.which("java")
    found = {}
    for name, files in (("meteor", (METEOR,)), ("spice", (SPICE, *CORENLP))):
        folder = next((one for one in folders if (one / files[0]).is_file()), None)
        if java is None:
            lacking = "java is not on PATH"
        elif folder is None:
            lacking = f"{files[0]} is missing. Do: pip install 'clipress[captions]'"
        elif absent := [file for file in files if not (folder / file).is_file()]:
            lacking = f"{folder / absent[0]} is missing. Do: python -m {PACKAGE}.spice.get_stanford_models"
        elif name == "spice" and (version := _java_version(java)) > LAST_JAVA:
            lacking = f"it requires Java 8 to {LAST_JAVA}, found {version}"
        else:
            found[name] = folder / files[0]
            continue
        log.warning("%s of captions is left out: %s.", name.upper(), lacking)
    return found


def _java_version(java: str) -> int:
    """Return the major version, 8 for 1.8; 0 if Java does not say."""
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False)
    version = re.search(r'version "(?:1\.)?(\d+)', said.stderr + said.stdout)
    return int(version[1]) if version else 0


def meteor(program: Path, captions: Texts, references: Sequence[Texts]) -> np.ndarray:
    """Return every image's part in METEOR, float64 [N], whose mean is the score of all."""
    command = ["java", "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", str(program), "-", "-", "-stdio", "-l", "en", "-norm"]
    with _conversation(command) as ask:
        pairs = zip(captions, references, strict=True)
        statistics = [ask(" ||| ".join(("SCORE", *texts, text)))[0].strip() for text, texts in pairs]
        # Only the program adds statistics up rightly: of a perfect caption it counts no chunk.
        *each, whole = map(float, ask(" ||| ".join(("EVAL", *statistics)), answers=len(statistics) + 1))
    return np.array(each) - np.mean(each) + whole


@contextmanager
def _conversation(command: Sequence[str]) -> Iterator[Callable[..., list[str]]]:
    """Start a program that answers lines by lines, and end it. The function that asks returns the answers."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8", errors="replace"
        )

        def ask(line: str, answers: int = 1) -> list[str]:
            try:
                process.stdin.write(line + "\n")
                process.stdin.flush()
            except BrokenPipeError:  # its last words are read below
                pass
            found = [process.stdout.readline() for _ in range(answers)]
            if not all(found):
                raise ProgramFailed(_last_line(errors))
            return found

        try:
            yield ask
        finally:
            process.kill()
            process.communicate()


def spice(program: Path, captions: Texts, references: Sequence[Texts]) -> np.ndarray:
    """Return every image's SPICE, float64 [N]. Parsed references are kept in the cache folder."""
    parsed = cache_folder() / "spice"
    parsed.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        asked, answered = Path(folder, "captions.json"), Path(folder, "scores.json")
        items = [
            {"image_id": place, "test": text, "refs": list(texts)}
            for place, (text, texts) in enumerate(zip(captions, references, strict=True))
        ]
        asked.write_text(json.dumps(items))
        command = ["java", "-Xmx8G", "-jar", program, asked, "-cache", parsed, "-out", answered, "-silent"]
        code = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=errors, check=False).returncode
        if code or not answered.is_file():
            raise ProgramFailed(_last_line(errors))
        scores = {item["image_id"]: item["scores"]["All"]["f"] for item in json.loads(answered.read_text())}
    return np.array([scores[place] for place in range(len(captions))], np.float64)


def _last_line(errors: IO[str]) -> str:
    errors.seek(0)
    return (errors.read().strip().splitlines() or ["it said nothing"])[-1]


SCORES: dict[str, Score] = {"meteor": meteor, "spice": spice}
