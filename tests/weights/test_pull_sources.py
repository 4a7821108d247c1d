"""`weights pull` of each source, its record, and a pull without a network."""

import json
import os
import random
import re
import subprocess
import sys

import pytest
from helpers_pull import COMMIT, REPO, contents, listing, pull, refused, serving, wanted

from mochi_tune.errors import ConfigError
from mochi_tune.weights.pull import PullSettings, main
from mochi_tune.weights.pull_record import RECORD
from mochi_tune.weights.sources import OFFICIAL_COMMIT, OFFICIAL_REPO


@pytest.fixture
def hub(monkeypatch):
    with serving(monkeypatch) as hub:
        yield hub


def add_repo(hub, repo, *names):
    """Adds another repository to the hub; returns the bytes of its files."""
    files = {name: random.Random(name).randbytes(900) for name in names}
    hub.files |= files
    hub.repos[repo] = {name: listing(name, content) for name, content in files.items()}
    return files


DIFFUSERS = (
    "model_index.json", "scheduler/scheduler_config.json", "transformer/config.json", "vae/config.json",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "transformer/diffusion_pytorch_model.bf16-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.bf16-00002-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.bf16.json",
    "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bf16.safetensors",
    "vae/modeling_vae.py", "text_encoder/pytorch_model.bin", "dit.safetensors",
    "text_encoder/config.json", "text_encoder/model-00001-of-00001.safetensors",
    "text_encoder/model.safetensors.index.json", "tokenizer/spiece.model", "tokenizer/tokenizer_config.json",
)  # fmt: skip


@pytest.mark.parametrize(("precision", "absent"), [("bf16", ""), ("fp32", ""), ("bf16", ".bf16-00002")])
def test_one_variant_of_diffusers_models_is_pulled(hub, tmp_path, precision, absent):
    names = [name for name in DIFFUSERS if not absent or absent not in name]
    files = add_repo(hub, "someone/theirs", *names)
    pull(hub, tmp_path, repo="someone/theirs", source="diffusers", precision=precision)
    taken = {name: ("bf16" if "bf16" in name else "plain") for name in contents(tmp_path) if "diffusion_py" in name}
    variant = "bf16" if precision == "bf16" else "plain"
    # A variant without all shards is ignored.
    of_dit = "plain" if absent else variant
    assert sorted(taken) == sorted(
        name
        for name in names
        if "diffusion_py" in name
        and ("bf16" in name) == ((of_dit if name.startswith("transformer") else variant) == "bf16")
    )
    rest = contents(tmp_path).keys() - taken.keys()
    assert rest == {
        "transformer/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer/spiece.model",
        "text_encoder/model-00001-of-00001.safetensors", "text_encoder/model.safetensors.index.json",
        "tokenizer/tokenizer_config.json",
    }  # fmt: skip
    assert contents(tmp_path) == {name: files[name] for name in contents(tmp_path)}


COMFYUI = (
    "diffusion_models/mochi_preview_bf16.safetensors", "diffusion_models/mochi_preview_fp8_scaled.safetensors",
    "vae/mochi_vae.safetensors", "text_encoders/t5xxl_fp16.safetensors",
    "text_encoders/t5xxl_fp8_e4m3fn_scaled.safetensors",
)  # fmt: skip


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_one_precision_of_comfyuis_files_is_pulled_with_the_official_tokenizer(hub, tmp_path, precision):
    files = add_repo(hub, "someone/comfy", "all_in_one/x.safetensors", *(f"split_files/{name}" for name in COMFYUI))
    add_repo(hub, OFFICIAL_REPO, "dit.safetensors", "tokenizer/spiece.model", "tokenizer/tokenizer_config.json")
    pull(hub, tmp_path, repo="someone/comfy", source="comfyui", precision=precision)
    arrived = contents(tmp_path)
    expected = {n for n in COMFYUI if ("fp8" in n) == (precision == "fp8") or n.startswith("vae")}
    assert arrived.keys() == expected | {"tokenizer/spiece.model", "tokenizer/tokenizer_config.json"}
    assert all(arrived[name] == files[f"split_files/{name}"] for name in expected)
    assert hub.listings == [("someone/comfy", "main"), (OFFICIAL_REPO, OFFICIAL_COMMIT)]
    assert pull(hub, tmp_path, repo="someone/comfy", source="comfyui", precision=precision) == []


def test_an_unknown_source_or_precision_is_one_line(tmp_path):
    for settings, text in [
        ({"source": "comfyiu"}, "source=comfyiu is not known: did you mean comfyui?"),
        ({"source": "x"}, "source=x is not known: use official, diffusers, comfyui."),
        ({"precision": "fp8"}, "source=official has no precision=fp8: use precision=published, or source=comfyui."),
        ({"source": "comfyui", "precision": "int4"}, "no precision=int4: use precision=bf16 or fp8."),
    ]:
        with pytest.raises(ConfigError, match=re.escape(text)):
            main(tmp_path, PullSettings(**settings))


def test_what_was_pulled_is_recorded_and_pins_the_folder(hub, tmp_path):
    pull(hub, tmp_path)
    record = json.loads((tmp_path / RECORD).read_text())
    [repository] = record["repositories"]
    assert (repository["repo"], repository["commit"], record["source"]) == (REPO, COMMIT, "official")
    assert repository["files"].keys() == contents(tmp_path).keys()
    for name, content in contents(tmp_path).items():
        entry, said = hub.listed[name], repository["files"][name]
        kept = {"sha256": entry["lfs"]["sha256"]} if "lfs" in entry else {"git_blob": entry["blobId"]}
        assert said == {"bytes": len(content), **kept}
    # The branch moves, but the folder stays at its commit.
    hub.commits["main"] = "d" * 40
    hub.listings.clear()
    assert pull(hub, tmp_path) == []
    assert hub.listings == [(REPO, COMMIT)]


def test_another_commit_is_taken_where_it_has_the_same_files_and_refused_where_not(hub, tmp_path):
    pull(hub, tmp_path)
    hub.commits["main"] = "d" * 40
    pull(hub, tmp_path, revision="main")
    assert json.loads((tmp_path / RECORD).read_text())["repositories"][0]["commit"] == "d" * 40
    changed = hub.files["decoder.safetensors"][::-1]
    hub.listed["decoder.safetensors"] = listing("decoder.safetensors", changed)
    hub.commits["main"] = "e" * 40
    before, kept = contents(tmp_path), (tmp_path / RECORD).read_bytes()
    message = refused(hub, tmp_path, revision="main")
    assert f"holds commit {'d' * 40} of {REPO}, and revision=main is commit {'e' * 40}, in which decoder" in message
    assert contents(tmp_path) == before and (tmp_path / RECORD).read_bytes() == kept


def test_a_stopped_pull_goes_on_with_its_commit_though_the_branch_moved(hub, tmp_path):
    hub.cut_after["dit.safetensors"] = [2_000_000, 0]
    refused(hub, tmp_path)
    hub.commits["main"] = "d" * 40
    pull(hub, tmp_path)
    assert hub.listings[-1] == (REPO, COMMIT) and hub.starts("dit.safetensors")[-1] == 2_000_000
    assert contents(tmp_path) == wanted(hub)


def test_a_folder_of_another_source_is_not_mixed(hub, tmp_path):
    pull(hub, tmp_path)
    for settings in ({"source": "diffusers"}, {"repo": "someone/else"}):
        assert "set to=DIR to another folder" in refused(hub, tmp_path, **settings)
    assert contents(tmp_path) == wanted(hub)


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.pop("source"),
        lambda value: value.update(repositories=[]),
        lambda value: value["repositories"][0].update(commit=3),
        lambda value: value["repositories"][0]["files"].update({"../x": {"bytes": 1, "sha256": "0" * 64}}),
        lambda value: value["repositories"][0]["files"].update({"x": {"bytes": 1, "sha256": "0" * 63}}),
    ],
)
def test_a_damaged_record_is_one_line(hub, tmp_path, change):
    pull(hub, tmp_path)
    value = json.loads((tmp_path / RECORD).read_text())
    change(value)
    (tmp_path / RECORD).write_text(json.dumps(value))
    assert "pulled.json is damaged" in refused(hub, tmp_path)


def test_without_a_network_the_folder_is_checked_by_its_record(hub, tmp_path):
    pull(hub, tmp_path)
    hub.instead["listing"] = (503, b"", {})
    [note] = pull(hub, tmp_path)
    assert re.fullmatch(r"offline \(.*503.*\): all 7 files are as they were pulled", note)
    # The record does not apply to another revision.
    assert "cannot be listed" in refused(hub, tmp_path, revision="v2")
    changed = tmp_path / "encoder.safetensors"
    changed.write_bytes(changed.read_bytes()[::-1])
    assert "encoder.safetensors is not the file on the hub" in refused(hub, tmp_path)
    changed.unlink()
    assert "lacks encoder.safetensors, and the hub cannot be asked" in refused(hub, tmp_path)


def test_the_command_line_offline_and_a_dry_run(hub, tmp_path):
    folder = tmp_path / "weights"
    command = [sys.executable, "-m", "mochi_tune.cli", "weights", "pull", f"to={folder}", f"repo={REPO}"]

    def run(*more, **environment):
        env = os.environ | environment
        return subprocess.run([*command, *more], capture_output=True, text=True, env=env)

    endpoint = f"endpoint={hub.address()}"
    done = run(endpoint, "dry_run=true")
    assert done.returncode == 0 and not folder.exists(), done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"{REPO}, commit {COMMIT}" and len(lines) == 9
    assert lines[1] == "    2.861 MiB  to fetch  dit.safetensors"
    assert re.fullmatch(r" +[\d.]+ MiB in all, [\d.]+ MiB to fetch, [\d.]+ GiB free", lines[-1])
    done = run(HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"repo={REPO} cannot be listed (HF_HUB_OFFLINE is set): unset it for the first pull" in done.stderr
    pull(hub, folder)
    hub.listings.clear()
    done = run(endpoint, HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and done.stdout == f"{folder}\n", done.stderr
    assert "mochi-tune: offline (HF_HUB_OFFLINE is set): all 7 files are as they were pulled" in done.stderr
    assert hub.listings == []
