import json

import pytest
import torch
from helpers_process import run
from torch._dynamo.exc import TorchDynamoException

from mochi_tune.cli.main import run as run_here
from mochi_tune.errors import ConfigError
from mochi_tune.recipes.bench import Bench, main

SMALL = {"model": "tiny", "num_frames": 13, "height": 32, "width": 48, "device": "cpu", "repeats": 1}


def test_a_step_is_measured_and_what_is_reduced_is_said(tmp_path):
    options = [f"{key}={value}" for key, value in SMALL.items()]
    done = run("bench", "what=sample", *options, "memory=24gb", f"out={tmp_path / 'new' / 'figures.jsonl'}")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert json.loads((tmp_path / "new" / "figures.jsonl").read_text()) == figures
    assert "reduced: depth 1 of 2" in done.stderr
    assert (figures["depth"], figures["full_depth"], figures["dit"], figures["device"]) == (1, 2, "fp8", "cpu")
    assert figures["num_tokens"] == 3 * 2 * 3
    for key in ("seconds_per_step", "peak_gib", "matrix_tflops_per_s", "attention_tflops_per_s", "floor_seconds"):
        assert figures[key] > 0
    assert figures["share_of_floor"] == pytest.approx(figures["floor_seconds"] / figures["seconds_per_step"], abs=1e-2)


@pytest.mark.parametrize("what", ["decode", "encode"])
def test_passes_of_the_vae_are_measured(what):
    figures = main(Bench(what, **SMALL, dtype="fp32", depth=1))
    assert figures["seconds"] > 0 and figures["latent_shape"] == [12, 3, 4, 6]
    # Counted by torch while it ran: all of the layers' convolutions.
    assert figures["tflop"] > 0 and figures["share_of_floor"] > 0


@pytest.mark.parametrize("what", ["sample", "train"])
def test_blocks_that_do_not_compile_leave_the_results_alone_on_stdout(what, monkeypatch, capsys):
    def compiled(*_, **__):
        raise TorchDynamoException("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: compiled)
    main(Bench(what, **SMALL, compile=True))
    said = capsys.readouterr()
    assert not said.out and "no compiler here" in said.err


def test_a_live_adapter_and_other_places_of_the_weights_are_measured():
    for place in ("int8", "offload"):
        figures = main(Bench("sample", **SMALL, dit=place, lora_rank=4))
        assert figures["seconds_per_step"] > 0 and figures["lora_rank"] == 4


def test_steps_of_a_training_are_measured_and_runs_are_lines_of_one_file(tmp_path):
    options = [f"{key}={value}" for key, value in SMALL.items()]
    for recompute in ("block", "auto"):
        done = run("bench", "what=train", *options, f"recompute={recompute}", f"out={tmp_path / 'figures.jsonl'}")
        assert done.returncode == 0, done.stderr
    whole, kept = (json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines())
    assert kept["lora_rank"] == 16 and kept["compile"] is False and kept["num_graphs"] == 0
    assert (whole["blocks_recomputed_whole"], kept["blocks_that_keep_attention"]) == (1, 1)
    streamed = main(Bench("train", **SMALL, dit="stream", activations="offload", precision="int8", depth=2))
    for figures in (whole, kept, streamed):
        for key in (
            "seconds_per_step",
            "first_step_seconds",
            "modulation_seconds",
            "peak_gib",
            "attention_backward_tflops_per_s",
        ):
            assert figures[key] > 0
        assert figures["tflops_per_s"] > 0


def test_several_processes_are_measured_as_one():
    options = [f"{key}={value}" for key, value in SMALL.items()]
    done = run("bench", "what=sample", *options, "parallel.num_processes=2")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["processes"] == 2 and figures["layout"]["guidance"] == 2


def test_what_cannot_be_measured_is_refused():
    for change, said in (
        ({"what": "cook"}, "what=cook is not possible: use sample or decode or encode or train"),
        ({"recompute": "some"}, "recompute=some is not possible: use auto, none, attention, block"),
        ({"model": "wan"}, "model=wan is not possible"),
        ({"num_frames": 40}, "use 37 or 43"),
        ({"depth": 3}, "depth=3 is more than the dit of model=tiny has: use at most 2"),
        ({"what": "train", "depth": 100}, "depth=100 is more than the dit of model=tiny has: use at most 2"),
        ({"what": "decode", "depth": 2}, "depth=2 is more than the decoder of model=tiny has: use at most 1"),
        ({"recompute": "block"}, "recompute=block does nothing with what=sample: use what=train, or leave it out"),
        ({"precision": "int8"}, "precision=int8 does nothing with what=sample"),
        ({"what": "decode", "lora_rank": 4}, "lora_rank=4 does nothing with what=decode: use what=sample or train"),
        ({"what": "encode", "compile": True}, "compile=true does nothing with what=encode"),
        ({"limit_gib": 8}, "limit_gib=8 limits the memory of a GPU: use device=cuda, or leave it out"),
        (
            {"what": "train", "activations": "offload", "recompute": "none"},
            "memory=12gb keeps the inputs of blocks in host memory, and recompute=none keeps all",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            main(Bench(**({"what": "sample"} | SMALL | change)))
    for more, said in (
        ("memory=8gb", "memory=8gb is not possible: use 12gb or 16gb or 24gb or 48gb or 80gb."),
        ("memory=auto", "memory=auto depends on the free memory"),
        ("out=figures.txt", "out=figures.txt does not fit: results are lines of JSON, so name a .jsonl file."),
    ):
        with pytest.raises(ConfigError, match=said):
            run_here(["bench", "what=sample", more])
