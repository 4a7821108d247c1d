"""Weights that would run code, are something else than weights, or change while processes use them."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from helpers_bomb import plant
from helpers_process import Disturbance, Program
from helpers_road import LORA, road, train
from safetensors.torch import load_file, save_file

from mochi_tune import assets
from mochi_tune.errors import CheckpointError, MochiTuneError
from mochi_tune.weights.folder import WeightsFolder

TINY = Path(assets.__path__[0]) / "tiny"
PARTS = ["dit", "encoder", "decoder", "text_encoder"]
PAGE = "\ufeff\n<!DOCTYPE html>\n<html><title>Sign in</title></html>"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def weights(tmp_path) -> Path:
    """A copy of the tiny model, to change."""
    return Path(shutil.copytree(TINY, tmp_path / "weights"))


def refused(call, error: type[MochiTuneError] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(path: Path, name: str) -> None:
    """Changes one number of a tensor in the file, which keeps its size."""
    tensors = load_file(path)
    tensors[name].view(-1)[-1] += 1
    save_file(tensors, path)


# Code beside weights.


def add_code(folder: Path, marker: Path) -> None:
    """Puts a module into a folder that makes a file when it is imported."""
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nfrom transformers import *\nTok = T = C = object\n")


def test_code_beside_weights_is_not_run(weights, tmp_path):
    marker = tmp_path / "exploded"
    for folder in (weights, weights / "text_encoder", weights / "tokenizer"):
        add_code(folder, marker)
        plant(folder / "pytorch_model.bin", marker)
    models = {"AutoConfig": "evil.C", "AutoModel": "evil.T", "AutoModelForTextEncoding": "evil.T"}
    change_json(weights / "text_encoder" / "config.json", auto_map=models, trust_remote_code=True)
    change_json(weights / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tok", "evil.Tok"]})
    folder = WeightsFolder(weights)
    folder.check(PARTS)
    [features] = folder.load_text_encoder("cpu", torch.float32).encode(["a cat"])
    [as_shipped] = WeightsFolder(TINY).load_text_encoder("cpu", torch.float32).encode(["a cat"])
    assert torch.equal(features, as_shipped)
    folder.load_dit("cpu", torch.float32)
    assert not marker.exists()


def test_a_tokenizer_that_needs_its_own_code_is_refused_and_nobody_is_asked(weights, tmp_path):
    add_code(weights / "tokenizer", tmp_path / "exploded")
    auto_map = {"AutoTokenizer": ["evil.Tok", "evil.Tok"]}
    change_json(weights / "tokenizer" / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="EvilTok")
    arguments = [
        "sample",
        "conf=my_lora",
        *road(tmp_path / "run"),
        f"model.weights={weights}",
        "prompt=x",
        "adapter=none",
    ]
    sampling = Program([*arguments, f"sample.prompt_cache={tmp_path / 'prompts'}"], tmp_path / "log")
    assert "contains custom code" in sampling.refusal and "y/N" not in sampling.text()
    assert not (tmp_path / "exploded").exists()


# What a download left that was none.


@pytest.mark.parametrize("content", [PAGE, POINTER], ids=["page", "pointer"])
@pytest.mark.parametrize("name", sorted(p.relative_to(TINY).as_posix() for p in TINY.rglob("*") if p.is_file()))
def test_a_login_page_or_a_pointer_in_place_of_a_file_is_named(weights, name, content):
    (weights / name).write_text(content)
    message = refused(lambda: WeightsFolder(weights).check(PARTS))
    assert str(weights / name) in message
    assert ("it is a web page" if content == PAGE else "it is a Git LFS pointer") in message


@pytest.mark.parametrize(
    ("content", "text"),
    [(PAGE.encode(), "it is a web page"), (b"", "it is empty"), (bytes(9000), "it is empty")],
)
def test_a_vocabulary_that_is_none_is_refused(weights, content, text):
    (weights / "tokenizer" / "spiece.model").write_bytes(content)
    assert text in refused(lambda: WeightsFolder(weights).check(["text_encoder"]))


def test_a_tokenizer_that_is_cut_off_is_one_line(weights):
    path = weights / "tokenizer" / "tokenizer.json"
    path.write_text("{}")
    assert "cannot be read as a tokenizer" in refused(lambda: WeightsFolder(weights).load_tokenizer())
    path.write_text((TINY / "tokenizer" / "tokenizer.json").read_text()[:3000])
    assert "cannot be read as JSON" in refused(lambda: WeightsFolder(weights).check(["text_encoder"]))


# Weights that change.


def rename_over(path: Path) -> None:
    """Replaces a file by one of the same content, size and time."""
    other = path.with_suffix(".new")
    shutil.copy2(path, other)
    os.replace(other, path)


def write_into(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("part", ["dit", "encoder", "decoder"])
@pytest.mark.parametrize("change", [rename_over, write_into, cut, Path.unlink])
def test_a_file_that_changes_between_the_check_and_the_load_is_noticed(weights, part, change):
    folder, path = WeightsFolder(weights), weights / f"{part}.safetensors"
    load = {"dit": folder.load_dit, "encoder": folder.load_encoder, "decoder": folder.load_decoder}[part]
    folder.check([part])
    load("cpu", torch.float32)
    change(path)
    message = refused(lambda: load("cpu", torch.float32))
    said = {rename_over: "was replaced by another file", cut: "was written to since it was checked, from"}
    said |= {write_into: "was written to", Path.unlink: "was removed"}
    assert str(path) in message and said[change] in message


def test_weights_that_are_swapped_while_a_run_starts_end_it(weights, tmp_path):
    arguments = ["train", "conf=my_lora", *road(tmp_path / "run", *LORA, "train.steps=1"), f"model.weights={weights}"]
    # After everything was checked, and before a weight is read.
    held = Program(arguments, tmp_path / "log", Disturbance(hold="mochi_tune.training.resume:find_start", hold_at=(1,)))
    held.wait_until_held()
    change_weights(weights / "dit.safetensors", "final_layer.linear.weight")
    held.release()
    assert f"{weights / 'dit.safetensors'} was" in held.refusal and "since it was checked" in held.refusal


def test_a_run_whose_base_changed_does_not_go_on(weights, tmp_path):
    more = ["train.steps=1", f"model.weights={weights}"]
    assert train(tmp_path / "run", *more) == 0
    tensors = load_file(weights / "dit.safetensors")
    tensors["blocks.0.attn.qkv_x.weight"][0, 0] += 1
    save_file(tensors, weights / "dit.safetensors")
    for force in ("auto", "force"):
        arguments = ["train", "conf=my_lora", *road(tmp_path / "run", *LORA, *more, "train.steps=2", f"resume={force}")]
        assert "the base model changed" in Program(arguments, tmp_path / "log").refusal


# Weights that differ between processes.


def said_by_two(folder: Path, first: list[str], second: list[str], *cwds: Path) -> str:
    """Runs two processes with arguments of their own, as on two machines; returns the one line that they write."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    env["GLOO_SOCKET_IFNAME"] = "lo"
    ranks = []
    for rank, (arguments, cwd) in enumerate(zip((first, second), cwds or (None, None), strict=True)):
        more = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(Program(arguments, folder / f"log_{rank}", env=more, cwd=cwd))
    written = "".join(f"{rank.wait()} {rank.err}" for rank in ranks)
    [line] = [line for line in written.splitlines() if "mochi-tune: rank" in line]
    assert [rank.wait() for rank in ranks] == [2, 2] and "Traceback" not in written, written
    return line


def test_processes_of_a_training_with_other_weights_or_settings_are_named(weights, tmp_path):
    def arguments(*more: str) -> list[str]:
        return ["train", "conf=my_lora", *road(tmp_path / "run", *LORA, "train.steps=1", "parallel=data", *more)]

    # The first row of the queries, by which adapters know their base, is the same in both.
    change_weights(weights / "dit.safetensors", "final_layer.linear.weight")
    other = arguments(f"model.weights={weights}")
    said = said_by_two(tmp_path, arguments(), other)
    assert "mochi-tune: rank 0: the files of the dit in model.weights: " in said and "on rank 1, " in said
    assert "start all processes with the same settings, and give each machine the same files." in said
    said = said_by_two(tmp_path, arguments(), arguments("train.learning_rate=0.5"))
    assert "the setting train.learning_rate: 0.5 on rank 1, " in said
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_processes_of_a_training_with_another_start_adapter_are_named(tmp_path):
    for name, seed in (("first", 1), ("second", 2)):
        assert train(tmp_path / name, "train.steps=1", f"seed={seed}") == 0
    more = ["train.steps=1", "parallel=data", "lora.init_from=adapter.safetensors"]
    arguments = ["train", "conf=my_lora", *road(tmp_path / "run", *LORA, *more)]
    # The same name, as on the disks of two machines.
    said = said_by_two(tmp_path, arguments, arguments, tmp_path / "first", tmp_path / "second")
    assert "rank 0: the adapter lora.init_from: " in said


def test_processes_of_a_rendering_with_other_weights_are_named(weights, tmp_path):
    def arguments(folder: Path) -> list[str]:
        more = [
            "prompt=x",
            "sample.adapter=none",
            "sample.steps=1",
            "sample.num_frames=7",
            f"sample.out={tmp_path / 'out'}",
        ]
        return ["sample", "conf=my_lora", *road(tmp_path / "run", *more), f"model.weights={folder}"]

    change_weights(weights / "decoder.safetensors", "output_proj.weight")
    said = said_by_two(tmp_path, arguments(TINY), arguments(weights))
    assert "rank 0: the files of the decoder in model.weights: " in said and "on rank 1, " in said
    assert not list(tmp_path.glob("out*/*.mp4"))
