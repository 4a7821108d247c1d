"""The list of adapter files, and arguments that the verbs accept."""

import pytest
from helpers_renders import write_adapter

from mochi_tune.cli.main import run
from mochi_tune.errors import MochiTuneError
from mochi_tune.ui import adapters
from mochi_tune.ui.adapters import Push


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loras").mkdir()
    for name in ("a", "b"):
        write_adapter(tmp_path / "loras" / f"{name}.safetensors", ord(name))


def test_every_verb_takes_the_arguments(tmp_path):
    a, b = "loras/a.safetensors", "loras/b.safetensors"
    assert adapters.list_adapters(tmp_path) == [("a.safetensors", a), ("b.safetensors", b)]
    page = adapters.inspect_page(tmp_path, a)
    (tmp_path / page).parent.mkdir()
    assert run(["lora", "inspect", a, f"out={page}"]) == 0 and (tmp_path / page).is_file()
    assert run(["lora", *adapters.merge_arguments(tmp_path, [a, b], "0.8, 0.5", ("", ""), "")]) == 0
    assert (tmp_path / "loras" / "a_and_b.safetensors").is_file()
    assert run(["lora", *adapters.resize_arguments(tmp_path, a, ("1", ""), "small.safetensors")]) == 0
    for _ in range(2):
        assert run(["export", *adapters.export_arguments(tmp_path, a, "diffusers", "bf16", "")]) == 0
    push = Push(a, "ada/a", ("diffusers", "comfyui"), license="apache-2.0")
    assert run(["export", *push.arguments(tmp_path, is_dry=True)]) == 0
    there = {path.name for path in (tmp_path / "loras").glob("*.safetensors")}
    assert there == {
        f"{n}.safetensors" for n in ("a", "b", "a_and_b", "small", "a_diffusers_bf16", "a_diffusers_bf16_2")
    }
    sent = {path.name for path in (tmp_path / "loras" / "hub" / "a").iterdir()}
    assert "README.md" in sent and "pytorch_lora_weights.safetensors" in sent and len(sent) == 3
    assert any("pytorch_lora_weights.safetensors" in line for line in push.explain(tmp_path))
    # Each push makes a new folder.
    assert push.arguments(tmp_path, is_dry=False)[-1] == "out=loras/hub/a_2"


def test_checkpoints_are_listed_under_any_name(tmp_path):
    checkpoints = tmp_path / "runs" / "x" / "checkpoints"
    for name in ("step_000004", "step_000004_kept"):
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "manifest.json").write_text('{"step": 4}')
        (checkpoints / name / "adapter.safetensors").touch()
    (tmp_path / "runs" / "x" / "config.yaml").touch()
    (tmp_path / "runs" / "x" / "metrics.jsonl").touch()
    labels = [label for label, _ in adapters.list_adapters(tmp_path)]
    assert labels[:2] == ["x, step_000004_kept", "x, step 4"]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda f: adapters.check_adapter(f, ""), "no adapter is chosen"),
        (lambda f: adapters.check_adapter(f, "../a.safetensors"), "outside of"),
        (lambda f: adapters.export_arguments(f, "gone", "diffusers", "fp32", ""), "gone does not exist"),
        (lambda f: adapters.export_arguments(f, A, "diffuser", "fp32", ""), "use diffusers"),
        (lambda f: adapters.export_arguments(f, A, "native", "fp32", "a.safetensors"), "exists already"),
        (lambda f: adapters.export_arguments(f, A, "native", "fp32", "a.pt"), "must end in .safetensors"),
        (lambda f: adapters.export_arguments(f, A, "native", "fp32", "../x.safetensors"), "outside of"),
        (lambda f: adapters.resize_arguments(f, A, ("", ""), ""), "neither given"),
        (lambda f: adapters.resize_arguments(f, A, ("1", "0.9"), ""), "both given"),
        (lambda f: adapters.resize_arguments(f, A, ("1.5", ""), ""), "whole number"),
        (lambda f: adapters.resize_arguments(f, A, ("", "2"), ""), "energy=2 does not fit"),
        (lambda f: adapters.merge_arguments(f, [A], "", ("", ""), ""), "two adapters or more"),
        (lambda f: adapters.merge_arguments(f, [A, A], "1 2 3", ("", ""), ""), "3 strengths for 2"),
        (lambda f: adapters.merge_arguments(f, [A, "hub:a/b"], "", ("", ""), ""), "export it first"),
        (lambda f: Push(A, "ada").arguments(f, False), "use owner/name"),
        (lambda f: Push(A, "ada/a", ()).arguments(f, False), "no format"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, act, message):
    with pytest.raises(MochiTuneError, match=message):
        act(tmp_path)


A = "loras/a.safetensors"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/cats/adapter.safetensors", "cats"),
        ("runs/cats/checkpoints/step_000020/adapter.safetensors", "cats_step_000020"),
        ("loras/a b.safetensors", "a b"),
        ("hub:ada/cats@main", "cats"),
        ("hub:ada/cats/x.safetensors", "x"),
    ],
)
def test_files_that_are_made_are_called_after_their_source(path, name):
    assert adapters.plain_name(path) == name
