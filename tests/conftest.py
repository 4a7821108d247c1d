import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    # Small models gain nothing from threads, and bit-for-bit comparisons need the same number everywhere.
    torch.set_num_threads(1)
