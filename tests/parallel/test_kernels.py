"""Attention kernels are timed on the device of the run, and the chosen one runs."""

import pytest
import torch
import torch.nn.functional as F
from helpers_golden import relative_error

from mochi_tune.parallel.kernels import (
    FLASH_VERSIONS,
    KERNELS,
    attention_by,
    has_kernel,
    preferred,
    time_attention,
)


def test_kernels_that_run_here_are_measured_and_no_other():
    seconds = time_attention((2, 40, 16), torch.device("cpu"), torch.float32)
    # A CPU has only flash attention; cuDNN's and the memory-efficient kernel need CUDA.
    assert seconds.keys() == {"flash"} and seconds["flash"] > 0
    # The CPU's kernel has the same name as a GPU's, but is a different one.
    assert not has_kernel("flash", (2, 40, 16), torch.device("cpu"), torch.float32)


def test_the_clock_does_not_choose_between_kernels_that_are_as_fast():
    assert preferred({"cudnn": 9.0, "flash": 4.1, "efficient": 4.0}, False) == "flash"
    assert preferred({"flash": 4.0, "efficient": 4.1}, False) == "flash"
    assert preferred({"flash": 5.0, "efficient": 4.0}, False) == "efficient"
    # Deterministic runs choose the same kernel, whatever the measured times.
    assert preferred({"flash": 5.0, "efficient": 4.0}, True) == "flash"
    assert preferred({"efficient": 4.0}, True) == "efficient"


class Implementation:
    """A replacement of torch's flash attention, registered as FlashAttention's packages do; knows if it is active."""

    def __init__(self):
        self.is_active = False

    def __call__(self):
        self.is_active = True
        return self

    def remove(self):
        self.is_active = False


def test_another_version_of_flash_attention_runs_where_it_is_installed_and_no_longer_than_asked(monkeypatch):
    shape, cpu = (2, 40, 16), torch.device("cpu")
    # Neither package is installed here.
    assert not time_attention(shape, cpu, torch.float32, FLASH_VERSIONS)
    with pytest.raises(ImportError), attention_by("fa4"):
        pass
    implementation = Implementation()
    monkeypatch.setitem(torch.nn.attention._registry._FLASH_ATTENTION_IMPLS, "FA4", implementation)
    with attention_by("fa4"):
        assert implementation.is_active and torch.nn.attention.current_flash_attention_impl() == "FA4"
        assert torch._C._get_sdp_priority_order()[0] == int(KERNELS["flash"].value)
    assert not implementation.is_active
    assert time_attention(shape, cpu, torch.float32).keys() == {"fa4", "flash"} and not implementation.is_active

    def built_for_another_torch():
        raise OSError("undefined symbol")

    monkeypatch.setitem(torch.nn.attention._registry._FLASH_ATTENTION_IMPLS, "FA3", built_for_another_torch)
    assert time_attention(shape, cpu, torch.float32).keys() == {"fa4", "flash"}
    # torch 2.11 does not know every version, and 2.10 cannot restore its own flash attention.
    monkeypatch.delitem(torch.nn.attention._registry._FLASH_ATTENTION_IMPLS, "FA3")
    assert time_attention(shape, cpu, torch.float32).keys() == {"fa4", "flash"}
    monkeypatch.delattr(torch.nn.attention, "restore_flash_attention_impl")
    assert time_attention(shape, cpu, torch.float32).keys() == {"flash"} and not implementation.is_active


def test_a_chosen_kernel_is_tried_first_and_what_it_cannot_do_still_runs():
    q = torch.randn(1, 2, 5, 8)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    expected, masked = F.scaled_dot_product_attention(q, q, q), F.scaled_dot_product_attention(q, q, q, mask)
    for name in KERNELS:
        with attention_by(name):
            assert torch._C._get_sdp_priority_order()[0] == int(KERNELS[name].value)
            assert relative_error(F.scaled_dot_product_attention(q, q, q), expected) <= 1e-5
            assert relative_error(F.scaled_dot_product_attention(q, q, q, mask), masked) <= 1e-5
