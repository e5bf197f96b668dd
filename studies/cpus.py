"""Run Python as on another CPU: instruction sets hidden from the process at full speed, or a whole CPU emulated.

    this machine        unchanged
    avx512_vnni         without AMX
    avx_vnni            without AMX and AVX-512
    avx512              without AMX and VNNI: products of 8-bit weights overflow
    avx2                without AMX, VNNI and AVX-512: the same
    emulated avx2       the same with qemu-user (Haswell), on any machine, some hundred times slower
    emulated arm        ARM with dot products; `emulated old arm`: a Cortex-A72, which has none

Hiding requires a C compiler and an x86 CPU that can fault on CPUID; emulation requires `qemu-x86_64` (Debian: qemu-user).
A child process has the packages of this environment, clipress included.

ARM requires `qemu-aarch64` and, at $ARM64_ROOT, an arm64 system: usr/bin/python3.11 with its libraries (Debian's arm64
packages, unpacked), and site/ with arm64 wheels of numpy and onnxruntime. Its programs have these packages only. onnxruntime
reads the CPU's features from /proc/cpuinfo, so one is written there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

from clipress.runtime.cpu import described_by_linux

NATIVE, EMULATED = "this machine", "emulated avx2"
HIDDEN = {
    "avx512_vnni": "amx",
    "avx_vnni": "amx avx512",
    "avx512": "amx vnni",
    "avx2": "amx vnni avx512",
}
ARM, OLD_ARM = "emulated arm", "emulated old arm"
MODELS = {EMULATED: "Haswell-noTSX", ARM: "max", OLD_ARM: "cortex-a72"}  # qemu's names
FEATURES = {  # and the number of the part
    ARM: (
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
        "0xd0c",
    ),
    OLD_ARM: ("fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid", "0xd08"),
}
SHIM = Path(__file__).with_name("hide_isa.c")
# A virtual environment's python is a link, which emulation resolves: its packages are added by hand.
START = (
    "import runpy, site, sys; site.addsitedir({packages!r}); sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


@cache
def missing(cpu: str) -> str | None:
    """Return why this machine cannot run programs as on a CPU, None if it can."""
    if cpu == NATIVE:
        return None
    if cpu in MODELS and not shutil.which(_qemu(cpu)):
        return f"{_qemu(cpu)} is not installed (Debian: apt-get install qemu-user)"
    if cpu in (ARM, OLD_ARM):
        return None if "ARM64_ROOT" in os.environ else "$ARM64_ROOT is not set"
    if cpu == EMULATED:
        return None
    needed = "avx512f" if cpu == "avx512" else cpu
    if needed not in described_by_linux()[1]:
        return f"this CPU has no {needed}"
    try:
        done = subprocess.run([sys.executable, "-S", "-c", ""], env=_hiding(cpu), capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{SHIM.name} cannot be compiled: {error}"
    return None if done.returncode == 0 else "this machine cannot fault on CPUID"


def python(cpu: str, script: Path | str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a Python file as on a CPU. Returns the finished process; the caller checks its exit status."""
    words = [str(script), *map(str, arguments)]
    given = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "HIDE_ISA")}
    if cpu == EMULATED:
        start = START.format(packages=sysconfig.get_path("purelib"))
        command = [_qemu(cpu), "-cpu", MODELS[cpu], str(Path(sys.executable).resolve()), "-c", start, *words]
    elif cpu in MODELS:
        root = Path(os.environ["ARM64_ROOT"])
        (root / "proc").mkdir(exist_ok=True)
        (root / "proc" / "cpuinfo").write_text(_arm_cpuinfo(*FEATURES[cpu]), encoding="utf-8")
        command = [_qemu(cpu), "-cpu", MODELS[cpu], "-L", str(root), str(root / "usr/bin/python3.11"), *words]
        given |= {"PYTHONPATH": str(root / "site")}
    else:
        command = [sys.executable, *words]
        given = dict(os.environ) if cpu == NATIVE else _hiding(cpu)
    return subprocess.run(command, capture_output=True, text=True, env=given)


def _arm_cpuinfo(features: str, part: str) -> str:
    about = {"BogoMIPS": "50.00", "Features": features, "CPU implementer": "0x41", "CPU architecture": "8"}
    about |= {"CPU variant": "0x0", "CPU part": part, "CPU revision": "1"}
    core = "".join(f"{key}\t: {value}\n" for key, value in about.items())
    return "".join(f"processor\t: {number}\n{core}\n" for number in range(os.cpu_count() or 1))


def _qemu(cpu: str) -> str:
    return "qemu-x86_64" if cpu == EMULATED else "qemu-aarch64"


def _hiding(cpu: str) -> dict[str, str]:
    return {**os.environ, "LD_PRELOAD": str(_shim()), "HIDE_ISA": HIDDEN[cpu]}


@cache
def _shim() -> Path:
    library = Path(tempfile.mkdtemp(prefix="clipress-cpus-")) / "hide_isa.so"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise OSError("no C compiler")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, SHIM], check=True, capture_output=True)
    return library
