"""Where Triton cannot launch a kernel, torch's code runs, and one line says what to install."""

import subprocess

import pytest
import torch

from mochi_tune.models import device, dit_kernels

CPU = torch.device("cpu")
# What Triton raises without a C compiler, without the headers of Python, and without the driver's library.
FAULTS = [
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c"]),
    AssertionError("libcuda.so cannot found!"),
]


@pytest.fixture(autouse=True)
def first_launch():
    device.triton_fault.cache_clear()
    device._has_triton.cache_clear()
    yield
    device.triton_fault.cache_clear()
    device._has_triton.cache_clear()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_launch_that_fails_leaves_the_work_to_torch_and_says_so_once(fault, monkeypatch):
    def launch(*_):
        raise fault

    monkeypatch.setattr(dit_kernels, "rms_norm", launch)
    lines = []
    monkeypatch.setattr(device._LOG, "warning", lambda text, *parts: lines.append(text % parts))
    assert not device._has_triton(CPU) and not device._has_triton(CPU)
    [line] = lines
    assert type(fault).__name__ in line and "apt-get install gcc python3-dev" in line and "\n" not in line


def test_a_processor_launches_no_kernel():
    assert device.triton_fault(CPU)


def test_a_full_gpu_does_not_count_as_one_without_triton(monkeypatch):
    def launch(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(dit_kernels, "rms_norm", launch)
    with pytest.raises(torch.OutOfMemoryError):
        device.triton_fault(CPU)
