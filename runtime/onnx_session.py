"""Open every ONNX Runtime session: INT8 in a mode that is correct on this CPU, each file self-tested once.

x86 CPUs without VNNI instructions overflow in products of 8-bit weights. Files with 7-bit weights have `portable` in
their metadata and give the same results everywhere; any other INT8 file is opened in ONNX Runtime's slower exact mode
on such a CPU.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from clipress.data.padding import TextEnd
from clipress.errors import ExportError
from clipress.runtime.cpu import processor
from clipress.runtime.graph import needed
from clipress.runtime.self_test import least_cosine, self_test_from

if TYPE_CHECKING:
    from clipress.runtime.graph import Arrays, Graph, Run

CPU = "CPUExecutionProvider"
EXACT_MODE = "session.x64quantprecision"
"""A session option; "1" widens the weights so that no product overflows. It also slows CPUs that do not need it."""
METADATA = "clipress"
Mode: TypeAlias = Literal["auto", "default", "exact"]
log = logging.getLogger("clipress.onnx_session")
_opened: dict[tuple[Any, ...], Mode] = {}  # Files that passed their self-test in this process, and their mode.


def open_session(
    path: Path,
    threads: int = 0,
    *,
    provider: str = CPU,
    float16: bool = False,
    profile_to: Path | None = None,
    mode: Mode = "auto",
) -> Any:
    """Open an ONNX file.

    Args:
        path: the file. If it has a self-test, that runs the first time a process opens it.
        threads: intra-op threads; 0 lets ONNX Runtime choose.
        provider: ONNX Runtime's execution provider.
        float16: must be set for files that compute in float16: ONNX Runtime crashes in the optimizer that lays out
            their convolutions for the CPU (microsoft/onnxruntime#15494), so that optimizer is disabled.
        profile_to: prefix of the profile's path; None writes no profile.
        mode: `auto` uses the exact mode where this CPU would overflow; the other two exist to compare them.

    Raises ExportError for a file that cannot be opened or fails its self-test on this machine.
    """
    file = file_identity(path, provider, mode)
    if file not in _opened:
        session, _opened[file] = _open_first(path, threads, provider, float16, mode)
        if profile_to is None:
            return session
    return _open(path, threads, provider, float16, _opened[file] == "exact", profile_to)


def _open_first(path: Path, threads: int, provider: str, float16: bool, mode: Mode) -> tuple[Any, Mode]:
    """Open a file for the first time: choose the mode that is correct on this CPU and run the self-test."""
    chosen: Mode = "exact" if mode == "exact" else "default"
    session = _open(path, threads, provider, float16, chosen == "exact")
    about = metadata_of(session)
    if mode == "auto" and provider == CPU and processor().saturates and not _is_portable(about):
        session, chosen = _open(path, threads, provider, float16, exact=True), "exact"
        if about:
            log.warning(
                "%s has 8-bit weights, whose products overflow on this CPU without VNNI instructions (%s). It runs in "
                "ONNX Runtime's exact mode: correct, but slower. Quantize with portable: true to avoid it.",
                path,
                processor(),
            )
    check(session, path, about)
    return session, chosen


def run_from_onnx(path: Path, threads: int = 0, *, float16: bool = False) -> Run:
    """Open an ONNX file as a function from inputs by name to outputs by name; arguments as for `open_session`."""
    return run_of(open_session(path, threads, float16=float16))


def run_of(session: Any) -> Run:
    """Return a session as a function from inputs by name to outputs by name; texts are given without their padding."""
    names = [output.name for output in session.get_outputs()]
    ends = ends_from(metadata_of(session))

    def run(inputs: Arrays) -> dict[str, Any]:
        return dict(zip(names, session.run(names, dict(needed(inputs, ends))), strict=True))

    return run


def reference_session(path: Path) -> Any:
    """Open an ONNX file with the optimizer off: INT8 then runs in float32, exact except for the order of sums."""
    import onnxruntime

    options = _options(0)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return _session(path, options, CPU, [])


def self_test_of(path: Path, graphs: Iterable[Graph], float16: bool = False) -> dict[str, Any]:
    """Return the self-test to store in a file that was made of these graphs."""
    inputs = [one for graph in graphs for one in graph.inputs if one.dtype == "int64"]
    largest = {one.name: one.largest for one in inputs}
    lengths = {one.name: one.shape[0] for one in inputs if one.end is not None}
    exact = partial(open_session, path, float16=float16, mode="exact")
    return self_test_from(partial(reference_session, path), exact, largest, lengths)


def metadata_of(session: Any) -> dict[str, Any]:
    """Return the clipress metadata of a session's file, see export/metadata.py; empty for other files."""
    try:
        about = json.loads(session.get_modelmeta().custom_metadata_map.get(METADATA, "{}"))
    except ValueError:
        return {}
    return about if isinstance(about, dict) else {}


def ends_from(about: Mapping[str, Any]) -> dict[str, TextEnd]:
    """Return where a file's texts end, by input, from its metadata. Raises ExportError for damaged ones."""
    try:
        ends = {name: TextEnd(**end) for name, end in about.get("ends", {}).items()}
        if any(not isinstance(token, int | None) for end in ends.values() for token in (end.eos, end.pad)):
            raise TypeError(f"expected an id or null, found {ends}")
    except (TypeError, AttributeError) as error:
        raise ExportError(f"The metadata of an ONNX file are damaged: ends, {error!s:.200}. Export it again.") from None
    return ends


def runs_exactly(session: Any) -> bool:
    """Return whether a session is in exact mode."""
    try:
        return session.get_session_options().get_session_config_entry(EXACT_MODE) == "1"
    except RuntimeError:  # The option was never set.
        return False


def check(session: Any, path: Path, about: dict[str, Any], runtime: str = "") -> float | None:
    """Run a file's self-test in a session. Returns the least cosine; None if the file has no self-test.

    `runtime` is the name and version of one that is not ONNX Runtime.

    Raises ExportError when the session does not agree with exact arithmetic.
    """
    test = about.get("self_test")
    if test is None:
        return None
    try:
        found, required = least_cosine(session, test), float(test["least_cosine"])
    except Exception as error:  # A damaged test can fail anywhere, and onnxruntime's errors have no common type.
        raise ExportError(
            f"The self-test in {path} cannot be read ({type(error).__name__}: {error}). Export it again: clipress "
            "export RUN"
        ) from None
    if not found >= required:
        if not runtime:
            import onnxruntime

            runtime = f"onnxruntime {onnxruntime.__version__}"
        raise ExportError(
            f"{path} fails its self-test on this machine: its outputs have a cosine of {found:.4f} with exact "
            f"arithmetic, at least {required} is required ({processor()}; {runtime}). "
            "8-bit weights overflow on x86 CPUs without VNNI instructions: quantize with portable: true and export "
            "again, or use a CPU with avx512_vnni or avx_vnni."
        )
    return found


def _is_portable(about: dict[str, Any]) -> bool:
    """Return whether a file's metadata promise that no INT8 product overflows; a file without the key may overflow."""
    return bool(about.get("portable", about.get("precision") == "fp32"))


def file_identity(path: Path, *how: str) -> tuple[Any, ...]:
    """Return what tells a file from others and from earlier content, and `how` it is opened."""
    try:
        state = Path(path).stat()
    except OSError:
        return (str(path), *how, None)
    return (str(path), *how, state.st_ino, state.st_size, state.st_mtime_ns)


def _open(path: Path, threads: int, provider: str, float16: bool, exact: bool, profile_to: Path | None = None) -> Any:
    options = _options(threads)
    if exact:
        options.add_session_config_entry(EXACT_MODE, "1")
    if profile_to is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_to)
    return _session(path, options, provider, ["NchwcTransformer"] if float16 else [])


def _options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if threads > 1:  # Spinning threads starve their neighbours on small machines.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _session(path: Path, options: Any, provider: str, disabled: list[str]) -> Any:
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(str(path), options, [provider], disabled_optimizers=disabled)
    except Exception as error:  # onnxruntime's errors have no common type.
        raise ExportError(
            f"{path} cannot be opened by ONNX Runtime {onnxruntime.__version__}: {error}. "
            "Update onnxruntime, or export it again: clipress export RUN"
        ) from None
