"""Files that are not what their names say: pickles that would run code, paths that lead out, settings that do more."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from helpers_bomb import plant
from helpers_process import Program
from helpers_road import LORA, road, train

from mochi_tune import assets
from mochi_tune.config.load import load_config
from mochi_tune.data_prep.captions import CaptionRules, load_captions
from mochi_tune.errors import CheckpointError, ConfigError, DataError
from mochi_tune.files import file_sha256
from mochi_tune.training.checkpoint import damage_of, manifest_of
from mochi_tune.weights.folder import WeightsFolder

TINY = Path(assets.__path__[0]) / "tiny"


def test_the_bomb_works(tmp_path):
    for number, num_bytes in enumerate((0, 4000)):
        path, marker = tmp_path / f"{number}.pt", tmp_path / f"exploded_{number}"
        plant(path, marker, num_bytes)
        if num_bytes:
            pickle.loads(path.read_bytes())  # noqa: S301 (what no code of ours may do)
        else:
            torch.load(path, weights_only=False)
        assert marker.exists()


def test_a_pickled_adapter_is_not_opened_by_any_verb(tmp_path):
    started = {}
    for name in ("a.pt", "a.safetensors"):
        file = plant(tmp_path / name, tmp_path / "exploded")
        started[f"sample {name}"] = ["sample", "conf=my_lora", *road(tmp_path), "prompt=x", f"adapter={file}"]
        started[f"export {name}"] = ["export", f"adapter={file}", "to=diffusers", f"out={tmp_path / 'out.safetensors'}"]
    # And as the run's own, which is found by itself.
    (tmp_path / "run").mkdir()
    plant(tmp_path / "run" / "adapter.safetensors", tmp_path / "exploded")
    started["sample own"] = ["sample", "conf=my_lora", *road(tmp_path / "run"), "prompt=x"]
    for name, arguments in started.items():
        refusal = Program(arguments, tmp_path / name.replace(".", "_")).refusal
        assert "is not safetensors, and pickles" in refusal, refusal
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("verb", "file", "text"),
    [
        ("sample", "dit.safetensors", "is a pickle of PyTorch, which is not supported"),
        ("train", "dit.safetensors", "is a pickle of PyTorch, which is not supported"),
        ("sample", "decoder.safetensors", "is a pickle of PyTorch, which is not supported"),
        ("prepare", "encoder.safetensors", "is a pickle of PyTorch, which is not supported"),
        ("prepare", "text_encoder/model.safetensors", "is a pickle of PyTorch, which is not supported"),
        (
            "sample",
            "text_encoder/pytorch_model.bin",
            "text_encoder has pytorch_model.bin, and only safetensors files are supported",
        ),
        ("train", "dit.pt", "has no dit.safetensors"),
    ],
)
def test_pickled_weights_are_not_opened(tmp_path, verb, file, text):
    weights = tmp_path / "weights"
    shutil.copytree(TINY, weights)
    if file.endswith((".bin", ".pt")):
        (weights / file).with_stem(Path(file).stem.removeprefix("pytorch_")).with_suffix(".safetensors").unlink()
    plant(weights / file, tmp_path / "exploded")
    more = (
        ["prompt=x", "adapter=none"]
        if verb == "sample"
        else [f"data.cache={tmp_path / 'cache'}"]
        if verb == "prepare"
        else []
    )
    arguments = [*road(tmp_path / "run"), f"model.weights={weights}", *more]
    assert text in Program([verb, "conf=my_lora", *arguments], tmp_path / "log").refusal
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("file", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
def test_a_pickle_in_a_checkpoint_is_not_opened_even_if_its_checksum_is_right(tmp_path, file):
    run_dir = tmp_path / "run"
    assert train(run_dir, "train.steps=1") == 0
    [checkpoint] = (run_dir / "checkpoints").glob("step_*")
    target, manifest = checkpoint / file, checkpoint / "manifest.json"
    size = target.stat().st_size
    plant(target, tmp_path / "exploded", size)
    sums = json.loads(manifest.read_text())["sha256"] | {file: file_sha256(target)}
    manifest.write_text(json.dumps(manifest_of(1, sums)))
    assert target.stat().st_size == size and damage_of(checkpoint) == ""
    resumed = Program(["train", "conf=my_lora", *road(run_dir, *LORA, "train.steps=2")], tmp_path / "log")
    assert str(target) in resumed.refusal
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["../../x.safetensors", "/etc/passwd", "a/../x.safetensors", "..", "x\0.safetensors",
                                  "C:\\x.safetensors", "", 7, None, ["x.safetensors"]])  # fmt: skip
def test_an_index_of_weights_names_files_beside_it_only(tmp_path, name):
    folder = tmp_path / "weights" / "transformer"
    folder.mkdir(parents=True)
    shutil.copy(TINY / "dit.safetensors", tmp_path / "x.safetensors")
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    config = json.dumps({
        "num_layers": 2, "patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8, "pooled_projection_dim": 8,
        "in_channels": 12, "text_embed_dim": 8,
    })  # fmt: skip
    (folder / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match="names files that are not next to it") as error:
        WeightsFolder(tmp_path / "weights").check(["dit"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["../outside.mp4", "/etc/passwd", "sub/../../outside.mp4", "a\0.mp4"])
def test_a_metadata_row_does_not_lead_out_of_the_folder(tmp_path, name):
    folder = tmp_path / "videos"
    folder.mkdir()
    (tmp_path / "outside.mp4").touch()
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    with pytest.raises(DataError, match="none of its 1 rows names a video"):
        load_captions(folder, [folder / "a.mp4"], CaptionRules())


DEFAULTS = "defaults: [base, {override model: tiny}, _self_]\n"


@pytest.mark.parametrize(
    ("yaml", "text"),
    [
        ("train: {_target_: os.system, _args_: [COMMAND]}\n", "train._target_ is not a setting"),
        ("_target_: os.system\n", "_target_ is not a setting"),
        ("hydra: {callbacks: {x: {_target_: os.system}}}\n", "hydra is not a setting"),
        ("hydra: {searchpath: ['pkg://antigravity']}\n", "hydra is not a setting"),
        ("name: !!python/object/apply:os.system ['COMMAND']\n", "could not determine a constructor"),
        ("name: !!python/name:os.system\n", "could not determine a constructor"),
        ("name: ${oc.env:SECRET}\n", "line 2: ${oc.env:SECRET} is not the name of a setting"),
        ("name: 'x${ oc.env:SECRET,none}'\n", "is not the name of a setting"),
        ("name: ${oc.decode:'[1]'}\n", "is not the name of a setting"),
        ("name: ${hydra:runtime.cwd}\n", "is not the name of a setting"),
        ("name: ${eval:'1+1'}\n", "is not the name of a setting"),
        ("train: {steps: \"__import__('os').system('COMMAND')\"}\n", "it takes a whole number"),
        ("name: ${oc.${model.name}:SECRET}\n", "is not the name of a setting"),
        ("name: ${name}\n", "name does not fit"),
        ("name: &n [*n]\n", "aliases (*name) and deep nesting are not allowed"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "aliases"),
        (f"name: {'[' * 5000}{']' * 5000}\n", "deep nesting"),
        (f"seed: {'9' * 5000}\n", "is not YAML"),
        ("name: \x07\n", "is not YAML"),
        ("name: a\nname: b\n", "found duplicate key name"),
        ("trian: {steps: 4}\n", "did you mean"),
    ],
)
def test_settings_from_elsewhere_are_plain_values_and_nothing_is_made_of_them(tmp_path, monkeypatch, yaml, text):
    monkeypatch.setenv("SECRET", "hunter2")
    path, marker = tmp_path / "theirs.yaml", tmp_path / "exploded"
    path.write_text(DEFAULTS + yaml.replace("COMMAND", f"touch {marker}"))
    with pytest.raises(ConfigError) as error:
        load_config(str(path), [])
    said = str(error.value)
    assert text in said and str(path) in said and "\n" not in said and "hunter2" not in said
    assert not marker.exists()


def test_a_nul_in_a_path_is_refused(tmp_path):
    path = tmp_path / "theirs.yaml"
    path.write_text(DEFAULTS + 'run_dir: "a\\0b"\n')
    with pytest.raises(ConfigError, match=r": run_dir='a\\x00b' is not possible: it must be text without NUL\.$"):
        load_config(str(path), [])


def test_plain_settings_from_elsewhere_are_read(tmp_path):
    path = tmp_path / "theirs.yaml"
    path.write_text(DEFAULTS + "name: hydra\nsample: {prompt: 'costs \\${oc.env}: 5'}\nrun_dir: runs/${name}\n")
    config = load_config(str(path), [])
    assert (config.name, config.run_dir, config.sample.prompt) == ("hydra", "runs/hydra", "costs ${oc.env}: 5")
