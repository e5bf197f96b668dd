"""Two processes that calibrate on half of the images each have the ranges of one that calibrates on all."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import torchrun

JOB = Path(__file__).with_name("calibration_job.py")


@pytest.mark.parametrize("method", ["max", "percentile", "entropy"])
def test_two_processes_have_the_ranges_of_one(method, tmp_path):
    subprocess.run([sys.executable, JOB, method, tmp_path / "one.pt"], check=True, capture_output=True, timeout=300)
    done = torchrun(JOB, method, tmp_path / "two.pt")
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(tmp_path / name) for name in ("one.pt", "two.pt"))
    assert one.keys() == two.keys() and len(one) > 10
    for name, wanted in one.items():
        assert torch.equal(two[name][0], two[name][1]), name
        torch.testing.assert_close(two[name][0], wanted[0], rtol=1e-5, atol=0, msg=name)
