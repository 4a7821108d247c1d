import os

# Small models gain nothing from threads, and bit-for-bit comparisons need the same number everywhere.
os.environ["OMP_NUM_THREADS"] = "1"

# Before decord, which brings libraries of other versions under the same names: PyAV's encoders would get those.
import av  # noqa: F401
import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
