import gc
import os
from multiprocessing import forkserver

# Small models gain nothing from threads, and bit-for-bit comparisons need the same number in all processes of a test.
os.environ["OMP_NUM_THREADS"] = os.environ.get("MOCHI_TUNE_TEST_THREADS", "1")
# Where there are more, those that wait for one another leave the processor to the other tests.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# What a freed tensor held is kept for the next one: giving it back and taking it anew is a tenth of the suite's time.
# Read when a process starts, so by the workers and by all that they start.
os.environ |= {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}

# Before decord, which brings libraries of other versions under the same names: PyAV's encoders would get those.
import av  # noqa: F401
import pytest
import torch
from helpers_parallel import start_forkserver, use_forkserver

from mochi_tune.cli.launch import keep_compiled_code, spare_the_collector

# As the command line does, for the tests that call a recipe.
keep_compiled_code()
spare_the_collector()


@pytest.fixture(autouse=True, scope="session")
def number_of_threads():
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Gives a worker of xdist the process that children are forked from, of which there is one for all workers."""
    start_forkserver()
    node.workerinput["forkserver"] = forkserver._forkserver._forkserver_address


@pytest.fixture(autouse=True, scope="session")
def preloaded(request):
    """Starts what children are forked from where no controller of xdist has."""
    address = getattr(request.config, "workerinput", {}).get("forkserver")
    if address is None:
        start_forkserver()
    else:
        use_forkserver(address)


@pytest.fixture(autouse=True)
def frozen():
    """Leaves what is imported out of the garbage that is collected: the stories do that after each of their stages."""
    yield
    gc.collect()
    gc.freeze()


# Files that take longest; the others fill what is left of each worker's time.
LONGEST = (
    "recipes/test_train_lora_parallel.py", "recipes/test_sample_parallel.py", "ui/test_page.py", "toy/test_demo.py",
    "parallel/test_recompute.py", "toy/test_experiment.py", "recipes/test_sample.py", "parallel/test_context.py",
    "training/test_trackers.py", "toy/test_train_toy.py", "training/test_retry.py", "recipes/test_verify.py",
    "toy/test_demo_buckets.py", "data_prep/test_prepare_buckets.py", "toy/test_measure.py",
    "faults/test_faults_kill.py", "faults/test_faults_ranks.py", "faults/test_faults_signals.py",
    "faults/test_faults_sample.py",
)  # fmt: skip


def pytest_xdist_auto_num_workers(config) -> int:
    """Half as many again as there are processors, as tests wait for processes; 12 at most, of up to 3 GiB each."""
    return min((os.cpu_count() or 2) * 3 // 2, 12)


def pytest_collection_modifyitems(items):
    """Puts the longest files first: with --no-loadscope-reorder, xdist gives the files out in this order."""
    ranks = {name: number for number, name in enumerate(LONGEST)}

    def rank(item) -> int:
        return ranks.get("/".join(item.path.parts[-2:]), len(ranks))

    items.sort(key=rank)
