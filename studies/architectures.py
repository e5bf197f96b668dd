"""What works with each architecture that open_clip lists? `python studies/architectures.py [--only NAME ...] [--width]`.

Every architecture is made small (`small_models.py`) and taken through what clipress does: loaded as a teacher, imported from a
file in open_clip's naming and from a hub folder, taken apart, pruned without training in each tower, saved and loaded, exported,
quantized. Each row is written into architectures.json and architectures.md as soon as it is there, and a row that is there is not
computed again. `--width` keeps the real widths; weights are random either way, so that nothing here is about accuracy.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import open_clip
import torch

from clipress.artifact import save_artifact
from clipress.bench.cost import cost
from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.settings import Runtime
from clipress.compress.stage import stages_from
from clipress.data.eval_sets import evalsets
from clipress.data.spec import DataSpec, SourceSpec
from clipress.errors import ClipressError, RecipeError, first_line
from clipress.export import parity
from clipress.export.settings import OnnxSettings
from clipress.export.to_onnx import onnx_from_artifact
from clipress.models import anatomy, convnets, surgery
from clipress.models.importers import import_checkpoint
from clipress.models.load import Model, artifact_from_model, save_for_open_clip
from clipress.studies.gpu import Rows
from clipress.studies.small_models import kind_of, loaded, registered, small_towers, stir
from clipress.tasks import model_from_artifact, runs_of
from clipress.tasks.clip import INPUTS, OUTPUTS, SIDES

HERE = Path(__file__).parent
DONE = "done"
IMAGE, TEXT = SIDES
UNALIGNED = {"head_dim": 1, "ffn": 1, "channels": 1}  # Small towers have few units.
TRAIN, TEST = SourceSpec(format="scenes", limit=16), SourceSpec(format="scenes", split="test", limit=8)


class Differs(Exception):
    """Two models that should be equal are not."""


class Architecture:
    """One small architecture and what has been made of it; every method is a column of the table."""

    def __init__(self, name: str, folder: Path, narrow: bool = True, exporter: str = "auto") -> None:
        self.folder, self.small, self.exporter = folder, registered(name, folder, narrow), exporter
        pixels = open_clip.get_model_config(self.small)["vision_cfg"]["image_size"]
        self.towers = partial(small_towers, pixels, narrow)
        self.model: Model | None = None
        self.cut: Model | None = None
        self.context = Context(start_fabric(Runtime()), DataSpec(train=(TRAIN,)), 0, title="sweep")

    def load(self) -> str:
        """Load it as a teacher."""
        self.model = loaded(self.small)
        return DONE

    def import_file(self) -> str:
        """Import a file with the weights of open_clip's own model: the same outputs."""
        try:
            stock = open_clip.create_model(self.small, load_weights=False).eval()
        except (TypeError, RuntimeError, OSError):  # A text tower from the hub: its names are transformers'.
            state, wanted = surgery.stock_weights(self.model.module), self._outputs(self.model)
        else:
            stir(stock)
            state, wanted = stock.state_dict(), self._outputs(replace(self.model, module=stock))
        torch.save(state, self.folder / "weights.pt")
        imported = import_checkpoint(self.folder / "weights.pt", "open_clip", self.small)
        _compare(self._outputs(imported), wanted, 1e-4)
        return DONE

    def import_folder(self) -> str:
        """Write open_clip's hub folder and import it: bitwise the same outputs."""
        if not save_for_open_clip(
            replace(self.model, tokenizer={**self.model.tokenizer, "kept": None}), self.folder / "hub"
        ):
            raise Differs("an uncut model is not written as a hub folder")
        _compare(self._outputs(import_checkpoint(self.folder / "hub")), self._outputs(self.model))
        return DONE

    def take_apart(self) -> str:
        """Count the parts of each tower, or the layers of a convolutional one, and the multiply-accumulates of both."""
        if not all(cost(self._saved("uncut", self.model)).macs_per_tower.values()):
            raise Differs("no multiply-accumulates were counted")
        found = Counter(part.tower for part in anatomy.parts(self.model.module))
        image = f"{found[IMAGE]}"
        if convnets.is_convnet(self.model.module):
            image = f"{len(convnets.layers(self.model.module))} layers"
        return f"{image} + {found[TEXT]}"

    def prune(self, tower: str) -> str:
        """Prune one tower to 60 % of its multiply-accumulates without training; what is cut already stays cut."""
        settings = {"budget": {tower: {"macs": 0.6}}, "steps": 0, "calibrate": 16, "batch_size": 8}
        settings |= {"align": UNALIGNED, "refit": {"samples": 16}}
        (stage,) = stages_from([{"prune": settings}])
        source = self.cut or self.model
        pruned, _ = stage.run(source.copy(), self.context)
        before, after = (sum(p.numel() for p in anatomy.tower_parameters(m.module, tower)) for m in (source, pruned))
        if not after < before:
            raise Differs("nothing was cut")
        self.cut = replace(pruned, module=pruned.module.eval())
        return DONE

    def save(self) -> str:
        """Save it, cut and uncut, and load it: bitwise the same outputs."""
        for name, model in self._models().items():
            folder = self._saved(name, model)
            _compare(self._outputs(model_from_artifact(folder)), self._outputs(model))
        return DONE

    def export(self) -> str:
        """Export it, cut and uncut, with parity to torch."""
        for name, model in self._models().items():
            settings = OnnxSettings(exporter=self.exporter if name == "uncut" else "torchscript")
            onnx_from_artifact(self._saved(name, model), self.folder / f"{name}-onnx", settings, evalsets([TEST]))
        return DONE

    def quantize(self) -> str:
        """Calibrate INT8 on training samples, save and export it."""
        (stage,) = stages_from([{"quantize": {"steps": 0, "calibrate": 16, "batch_size": 8}}])
        quantized, _ = stage.run(self.model.copy(), self.context)
        folder, limits = self._saved("int8", quantized), dict(parity.LIMITS)
        parity.LIMITS["int8"] = (0.98, 0.0, 1.0)  # Weights are random, so rankings mean nothing.
        try:
            onnx_from_artifact(folder, self.folder / "int8-onnx", OnnxSettings(int8="qdq"), evalsets([TEST]))
        finally:
            parity.LIMITS.update(limits)
        return DONE

    def _models(self) -> dict[str, Model]:
        return {"uncut": self.model, **({} if self.cut is None else {"cut": self.cut})}

    def _saved(self, name: str, model: Model) -> Path:
        folder = self.folder / name
        return save_artifact(artifact_from_model(model, ({"stage": name, "hash": name},), {}), folder)

    def _outputs(self, model: Model) -> list[np.ndarray]:
        size, ids = self.model.preprocess.size, self.model.tokenize()(["a red ball", "two small green squares"])
        pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).numpy()
        runs = runs_of(model)
        return [
            runs[side]({INPUTS[side]: rows})[OUTPUTS[side]] for side, rows in zip(SIDES, (pixels, ids), strict=True)
        ]


COLUMNS: dict[str, Callable[[Architecture], str]] = {
    "load": Architecture.load,
    "import file": Architecture.import_file,
    "import folder": Architecture.import_folder,
    "parts": Architecture.take_apart,
    **{f"prune {side}": partial(Architecture.prune, tower=side) for side in SIDES},
    "save": Architecture.save,
    "export": Architecture.export,
    "INT8": Architecture.quantize,
}


def _compare(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray], limit: float = 0.0) -> None:
    for side, rows, theirs in zip(SIDES, found, wanted, strict=True):
        difference = float(np.abs(rows - theirs).max())
        if not difference <= limit:  # NaN differs too.
            raise Differs(f"outputs of the {side} tower differ by {difference:.2g}")


def row_of(name: str, narrow: bool = True, exporter: str = "auto") -> dict[str, str]:
    """Take one architecture through all columns. Returns for each: done, a count, or what failed and why in a sentence."""
    row: dict[str, str] = {}
    with TemporaryDirectory(prefix="clipress-sweep-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = Architecture(name, Path(folder), narrow, exporter)
        with one.towers():
            for column, do in COLUMNS.items():
                try:
                    row[column] = do(one)
                except (ClipressError, Differs) as error:
                    row[column] = str(error).splitlines()[0][:300]
                except Exception as error:
                    row[column] = f"{type(error).__name__}: {first_line(error)}"[:300]
                if one.model is None:
                    break
    return row


def is_done(cell: str | None) -> bool:
    """Return whether a cell says that a column works."""
    return cell == DONE or bool(cell and cell[0].isdigit() and " + " in cell)


def markdown(found: dict[str, Any]) -> str:
    """Return the counts, a row per architecture, and what does not work with the reasons."""
    about, rows = found["conditions"], found["rows"]
    lines = [
        "# What works with open_clip's architectures",
        "",
        f"`{about['command']}`, {about['date']}, open_clip {about['open_clip_torch']}, timm {about['timm']}, torch {about['torch']}. "
        f"Every architecture with two blocks{'' if about['real width'] else ', narrow'}, on tiny images, with a reduced vocabulary and "
        "random weights. *Pruned*: to 60 % of the tower's multiply-accumulates, without training. *Save*: bitwise the same outputs. "
        "*Export*: ONNX with parity to torch, uncut and cut.",
        "",
        *counts(rows),
        "",
        f"| | {' | '.join(COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
    ]
    notes: list[str] = []
    for name, row in rows.items():
        cells = []
        for column in COLUMNS:
            cell = row.get(column, row.get("failed", "not reached"))
            if not is_done(cell) and cell not in notes:
                notes.append(cell)
            cells.append("✓" if cell == DONE else cell if is_done(cell) else f"[{notes.index(cell) + 1}]")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]).rstrip() + "\n"


def counts(rows: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return a table of how many architectures of each kind do what each column says, and how many are pruned in both towers."""
    columns = [column for column in COLUMNS if column != "parts"]
    kinds: dict[str, list[Mapping[str, str]]] = {}
    for name, row in rows.items():
        kinds.setdefault(kind_of(open_clip.get_model_config(name)), []).append(row)
    lines = [f"| | architectures | {' | '.join(columns)} | prune both |", f"|---|{'---|' * (len(columns) + 2)}"]
    for kind, found in [*sorted(kinds.items(), key=lambda pair: -len(pair[1])), ("all", list(rows.values()))]:
        done = [sum(is_done(row.get(column)) for row in found) for column in columns]
        both = sum(all(is_done(row.get(f"prune {side}")) for side in SIDES) for row in found)
        lines.append(f"| {kind} | {len(found)} | {' | '.join(map(str, [*done, both]))} |")
    return lines


def conditions(narrow: bool) -> dict[str, Any]:
    """Return with what this was computed."""
    from importlib.metadata import version

    return {
        "command": "python studies/architectures.py" + ("" if narrow else " --width"),
        "date": date.today().isoformat(),
        "real width": not narrow,
        **{name: version(name) for name in ("torch", "open_clip_torch", "timm", "onnxruntime", "nvidia-modelopt")},
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out log lines meanwhile, up to warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@quiet()
def main(arguments: list[str] | None = None) -> None:
    """Compute the rows that are not there yet, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=open_clip.list_models())
    parser.add_argument("--width", action="store_true", help="keep the real widths")
    parser.add_argument("--again", action="store_true", help="compute the rows again")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args(arguments)
    narrow = not options.width
    path = options.out / f"architectures{'-width' if options.width else ''}.json"
    try:
        rows = Rows(path, conditions(narrow), markdown)
    except RecipeError as error:
        parser.exit(2, f"{error}\n")
    for name in options.only:
        if options.again:
            rows.found["rows"].pop(name, None)
        rows.add(name, partial(row_of, name, narrow))
    order = {name: place for place, name in enumerate(open_clip.list_models())}
    rows.found["rows"] = dict(sorted(rows.found["rows"].items(), key=lambda pair: order[pair[0]]))
    rows.write()


if __name__ == "__main__":
    main()
