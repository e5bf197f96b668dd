"""This machine's CPU: its name, its cores, its instruction sets, and whether INT8 products overflow on it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")
QUOTA = Path("/sys/fs/cgroup/cpu.max")
X86 = ("x86_64", "AMD64", "i386", "i686")
VNNI = ("avx512_vnni", "avx_vnni")
SHOWN = ("avx2", "avx512f", *VNNI, "amx_int8", "asimddp", "i8mm", "sve")  # INT8 kernels are written for these.
NUMPY = {"AVX2": "avx2", "AVX512F": "avx512f", "AVX512VNNI": "avx512_vnni"}  # numpy's names for some of them.


@dataclass(frozen=True)
class Processor:
    """A CPU, as far as INT8 depends on it."""

    name: str
    machine: str
    """Such as x86_64, see `platform.machine()`."""
    cores: int
    isa: tuple[str, ...]
    """Instruction sets, in Linux's names."""

    @property
    def saturates(self) -> bool:
        """Whether u8 x s8 kernels add two products in 16 bits: x86 without VNNI instructions.

        Weights beyond 64 overflow there unless ONNX Runtime runs in its exact mode.
        """
        return self.machine in X86 and not set(VNNI) & set(self.isa)

    def record(self) -> dict[str, Any]:
        """Return the fields that results.json records."""
        return {"processor": self.name, "cores": self.cores, "isa": list(self.isa)}

    def __str__(self) -> str:
        return f"{self.name}, {' '.join(self.isa) or self.machine}"


@cache
def processor() -> Processor:
    """Return the CPU that this process runs on, possibly an emulated one."""
    name, flags = described_by_linux()
    fallback = platform.processor() or platform.machine()
    return Processor(name or fallback, platform.machine(), os.cpu_count() or 1, instruction_sets(flags, _by_numpy()))


def usable_cores() -> int:
    """Return how many cores this process may keep busy: those of its affinity, within a container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text().split()
        return max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup of version 2, or `max`: no quota
        return allowed


def instruction_sets(flags: Set[str], numpy_found: Mapping[str, bool] | None) -> tuple[str, ...]:
    """Return the instruction sets among `SHOWN` that a process can use.

    Linux's flags are complete, but an emulator or a container may show those of another CPU. numpy queries the CPU for
    some of them; where the two differ, only numpy is trusted.
    """
    if numpy_found is not None and "AVX2" in numpy_found:
        queried = {linux: bool(numpy_found.get(name)) for name, linux in NUMPY.items()}
        if any((name in flags) != has for name, has in queried.items()):
            flags = {name for name, has in queried.items() if has}
    return tuple(name for name in SHOWN if name in flags)


def described_by_linux() -> tuple[str, set[str]]:
    """Return the CPU's name and flags from /proc/cpuinfo, possibly those of another CPU; empty without that file."""
    name, flags = "", set()
    if CPUINFO.is_file():
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                name = value
            elif key in ("flags", "Features"):
                flags = set(value.split())
    return name, flags


def _by_numpy() -> Mapping[str, bool] | None:
    """Return the features that numpy's dispatch found; None if this release keeps them elsewhere."""
    try:
        from numpy._core._multiarray_umath import __cpu_features__ as found
    except ImportError:
        try:
            from numpy.core._multiarray_umath import __cpu_features__ as found  # numpy 1
        except ImportError:
            return None
    return found
