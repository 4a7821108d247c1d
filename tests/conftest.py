import os

# Small models gain nothing from threads, and bit-for-bit comparisons need the same number in all processes of a test.
os.environ["OMP_NUM_THREADS"] = os.environ.get("MOCHI_TUNE_TEST_THREADS", "1")

# Before decord, which brings libraries of other versions under the same names: PyAV's encoders would get those.
import av  # noqa: F401
import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def number_of_threads():
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
