"""The page's plan is for the GPU of this machine, or says that it does not know this GPU."""

import tracemalloc

import pytest

from mochi_tune.config.load import load_config
from mochi_tune.ui.plan import likely_card, name_here, plan_html

FULL = ["model.weights=nowhere", "data.videos=nowhere", "data.cache=nowhere"]


@pytest.fixture
def put_gpu(tmp_path, monkeypatch):
    """Returns a function that installs an nvidia-smi which prints names of GPUs."""

    def put(*names: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\n" + "".join(f"echo '{name}'\n" for name in names))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        name_here.cache_clear()

    yield put
    name_here.cache_clear()


@pytest.mark.parametrize(
    ("names", "card"),
    [
        (["NVIDIA A100-PCIE-40GB"], "a100-40"),
        (["NVIDIA A100-SXM4-80GB"] * 2, "a100"),
        (["NVIDIA RTX A6000", "NVIDIA GeForce RTX 4090"], "a6000"),
        (["NVIDIA H200"], "h200"),
    ],
)
def test_a_card_is_known_by_the_first_line(put_gpu, names, card):
    put_gpu(*names)
    assert likely_card() == card
    assert "is not known" not in plan_html(load_config("my_lora", FULL), card)


def test_an_unknown_card_is_said_to_be_unknown(put_gpu):
    put_gpu("NVIDIA T4 <2>", "NVIDIA H200")
    assert likely_card() == "4090"
    text = plan_html(load_config("my_lora", FULL), likely_card())
    assert "The GPU of this machine, NVIDIA T4 &lt;2&gt;, is not known: this is an estimate for a 4090." in text
    assert "fits" in text


def test_long_times_are_plain_numbers():
    text = plan_html(load_config("my_lora", [*FULL, "sample.height=4096", "sample.width=4096"]), "4090")
    assert "e+0" not in text and " s a video" in text


def test_a_number_of_steps_with_too_many_zeros_takes_no_memory():
    config = load_config("my_lora", [*FULL, "train.steps=1000000", "train.checkpoint_every=1"])
    plan_html(config, "4090")
    tracemalloc.start()
    text = plan_html(config, "4090")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "all 1000000 steps" in text and peak < 10 * 2**20
