"""The name and instruction sets of a CPU, also where their sources differ."""

import pytest

from clipress.runtime import cpu
from clipress.runtime.cpu import Processor, instruction_sets, usable_cores

NEW = {"sse4_2", "avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8"}


def numpy_says(*found):
    return {name: name in found for name in ("AVX2", "AVX512F", "AVX512VNNI", "FMA3")}


def test_linux_names_all_sets_if_numpy_finds_the_same_cpu():
    found = instruction_sets(NEW, numpy_says("AVX2", "AVX512F", "AVX512VNNI"))
    assert found == ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")


@pytest.mark.parametrize(
    ("emulated", "sets"), [(("AVX2",), ("avx2",)), (("AVX2", "AVX512F"), ("avx2", "avx512f")), ((), ())]
)
def test_numpy_takes_precedence_if_linux_describes_another_cpu(emulated, sets):
    assert instruction_sets(NEW, numpy_says(*emulated)) == sets


def test_linux_is_trusted_if_numpy_reports_nothing():
    assert instruction_sets({"avx2", "avx_vnni"}, None) == ("avx2", "avx_vnni")
    assert instruction_sets({"asimd", "asimddp", "i8mm"}, {"NEON": True}) == ("asimddp", "i8mm")  # ARM


@pytest.mark.parametrize(
    ("machine", "isa", "saturates"),
    [
        ("x86_64", ("avx2",), True),
        ("x86_64", ("avx2", "avx512f"), True),
        ("AMD64", (), True),
        ("x86_64", ("avx2", "avx_vnni"), False),
        ("x86_64", ("avx2", "avx512f", "avx512_vnni"), False),
        ("aarch64", (), False),
        ("arm64", ("asimddp",), False),
    ],
)
def test_products_overflow_on_x86_without_vnni(machine, isa, saturates):
    assert Processor("A CPU", machine, 2, isa).saturates is saturates


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("300000 100000", 3), ("50000 100000", 1), ("9900000 100000", 8), ("", 8)]
)
def test_a_containers_quota_limits_the_cores_of_its_affinity(quota, cores, tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(cpu, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert usable_cores() == cores
