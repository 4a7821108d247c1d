"""The folder of a published adapter, its card, and the upload to a hub on localhost."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers_adapters import ATTENTION, random_adapter, with_magnitudes
from helpers_diffusers import to_diffusers
from helpers_hub import UploadHub, silent_hub
from helpers_road import LORA, command, road, train
from safetensors.torch import load_file

from mochi_tune.adapters.files import load_adapter, save_adapter
from mochi_tune.cli.options import EXPORT_OPTIONS, load, plain_options
from mochi_tune.cli.publish import push_trained, run_export
from mochi_tune.config.load import load_config
from mochi_tune.errors import CheckpointError, ConfigError
from mochi_tune.files import file_sha256
from mochi_tune.recipes.export import main as export
from mochi_tune.recipes.publish import Publication, main
from mochi_tune.training.records import read_run

EVALS = [
    "train.validate_every=1",
    "train.sample_every=2",
    "sample.steps=2",
    "train.sample_prompts=['a `red` | ball','b']",
]
SETTINGS = [
    "train.steps=3",
    "train.max_grad_norm=0",
    "sample.fps=24",
    *EVALS,
    "publish.author=Ada",
    "publish.license=apache-2.0",
]
REPO = "ada/balls"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "balls"
    assert train(folder, *SETTINGS, "publish.trigger=zyx", "name=red balls") == 0
    return folder


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    hub = UploadHub()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    yield hub
    hub.close()


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_has_what_the_card_shows(run_dir, tmp_path):
    out = tmp_path / "hub"
    made = main(Publication(run_dir / "adapter.safetensors", ("diffusers", "comfyui"), repo=REPO), out)
    assert made.notes == []
    videos = {f"samples/{n}_step_000003_prompt_{n}.mp4" for n in range(2)}
    files = {"README.md", "pytorch_lora_weights.safetensors", "red_balls_comfyui.safetensors", "validation_loss.png"}
    assert contents(out).keys() == files | videos
    text = (out / "README.md").read_text()
    facts = front_matter(text)
    assert facts["widget"][0] == {"text": "a `red` | ball", "output": {"url": "samples/0_step_000003_prompt_0.mp4"}}
    assert (facts["pipeline_tag"], facts["library_name"], facts["license"]) == (
        "text-to-video",
        "diffusers",
        "apache-2.0",
    )
    assert facts["instance_prompt"] == "zyx" and "By Ada." in text and "# red balls" in text
    # It is an adapter of the tiny model and not of Mochi 1.
    assert "base_model" not in facts and "model `tiny`" in text
    for row in ("| clips trained on | 3 of 3 |", "| steps | 3 |", "| rank | 2 |", "unclipped", "a \\`red\\` \\| ball"):
        assert row in text
    # The card has no name of a clip, no caption and no local path.
    assert "clip_0" not in text and "hill" not in text and str(run_dir) not in text and str(tmp_path) not in text


def test_the_card_shows_only_videos_of_this_adapter(run_dir, tmp_path):
    run = shutil.copytree(run_dir, tmp_path / "run")
    ours = {"sha256": file_sha256(run / "adapter.safetensors"), "strength": 1.0}
    facts = {
        "plain": {"adapters": [ours]},
        "weaker": {"adapters": [ours | {"strength": 0.5}]},
        "other": {"adapters": [ours | {"sha256": "0" * 64}]},
        "two": {"adapters": [ours, ours]},
        "fading": {"adapters": [ours | {"strength_schedule": [1.0, 0.0]}]},
        "in part": {"adapters": [ours | {"block_strength": {"0": 0.5}}]},
        "begun": {"adapters": [ours], "init_video": {"file": "a.mp4"}},
    }
    for name, record in facts.items():
        (run / "samples" / f"{name}.mp4").write_bytes(b"a video")
        (run / "samples" / f"{name}.json").write_text(json.dumps({"prompt": name} | record))
    records = read_run(run, run / "adapter.safetensors", 3)
    assert [video.prompt for video in records.videos if not video.file.name.startswith("step_")] == ["plain"]


def test_the_commands_of_the_card_are_valid(run_dir, tmp_path):
    main(Publication(run_dir / "adapter.safetensors", repo=REPO), tmp_path / "hub")
    text = (tmp_path / "hub" / "README.md").read_text()
    fences = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks = "".join(block for language, block in fences if not language).replace("\\\n", " ")
    commands = [shlex.split(line) for line in blocks.splitlines()]
    assert [each[:2] for each in commands] == [
        ["hf", "download"], ["mochi-tune", "export"], ["hf", "download"], ["mochi-tune", "sample"],
    ]  # fmt: skip
    options = plain_options("export", commands[1][2:], EXPORT_OPTIONS)
    assert options is not None and options["to"] == "comfyui" and options["out"] == "balls.safetensors"
    config = load("sample", commands[3][2:])
    assert config is not None and (config.sample.prompt, config.sample.width) == ("a `red` | ball", 48)
    [node] = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    assert json.loads(node)["2"]["inputs"]["lora_name"] == "balls.safetensors"


def test_the_trained_file_and_its_export_state_their_date(run_dir, tmp_path):
    trained = load_adapter(run_dir / "adapter.safetensors").metadata
    keys = ("title", "author", "license", "trigger_phrase", "resolution", "description", "date")
    assert [trained.get(f"modelspec.{key}") for key in keys] == [
        "red balls", "Ada", "apache-2.0", "zyx", "48x32", "LoRA of tiny, 3 steps on clips of up to 7 frames.", None,
    ]  # fmt: skip
    checkpoint = run_dir / "checkpoints" / "step_000003" / "adapter.safetensors"
    for name, source in (("a", run_dir / "adapter.safetensors"), ("b", checkpoint)):
        export(source, "comfyui", tmp_path / f"{name}.safetensors")
        date = load_adapter(tmp_path / f"{name}.safetensors").metadata["modelspec.date"]
        assert date == json.loads((run_dir / "history.jsonl").read_text())["date"]


def test_the_card_of_an_adapter_of_mochi_1_names_its_base(tmp_path):
    adapter = random_adapter(ATTENTION)
    adapter.metadata["base_model"] = "mochi_1"
    save_adapter(tmp_path / "a.safetensors", adapter)
    made = main(Publication(tmp_path / "a.safetensors"), tmp_path / "hub")
    facts = front_matter((tmp_path / "hub" / "README.md").read_text())
    assert (facts["base_model"], facts["base_model_relation"]) == ("genmo/mochi-1-preview", "adapter")
    assert "license" not in facts and len(made.notes) == 3 and "is in no run folder" in made.notes[2]


def test_the_code_for_diffusers_runs(run_dir, tmp_path):
    """Runs it unchanged except for the two repositories, the GPU and the library that writes the video."""
    out = tmp_path / "hub"
    main(Publication(run_dir / "adapter.safetensors", repo=REPO), out)
    [code] = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    save_pipeline(tmp_path / "base")
    for old, new in (
        ("'FOLDER_OF_THE_BASE'", repr(str(tmp_path / "base"))),
        (repr(REPO), repr(str(out))),
        ("pipe.enable_model_cpu_offload()\n", ""),
        ('export_to_video(frames, "video.mp4", fps=24)\n', ""),
    ):
        assert old in code
        code = code.replace(old, new)
    names = {}
    exec(compile(code, "card", "exec"), names)
    assert len(names["frames"]) == 7 and names["frames"][0].size == (48, 32)
    loaded = names["pipe"].transformer.state_dict()
    for key, tensor in load_file(out / "pytorch_lora_weights.safetensors").items():
        name = key.removeprefix("transformer.").replace(".weight", ".default_0.weight")
        assert torch.equal(loaded[name], tensor.bfloat16()), key


def test_the_code_of_the_page_for_diffusers_runs(run_dir, tmp_path):
    """Runs it unchanged except for the base, the sizes, the steps, the GPU and the library that writes the video."""
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "other_programs.md").read_text(), re.DOTALL)
    save_pipeline(tmp_path / "base")
    export(run_dir / "adapter.safetensors", "diffusers", tmp_path / "my_lora.safetensors")
    for old, new in (
        ('"genmo/mochi-1-preview"', repr(str(tmp_path / "base"))),
        ('"my_lora.safetensors"', repr(str(tmp_path / "my_lora.safetensors"))),
        ("num_frames=37", "num_frames=7"),
        ("height=480", "height=32"),
        ("width=848", "width=48"),
        ("num_inference_steps=64", "num_inference_steps=2"),
        ("pipe.enable_model_cpu_offload()\n", ""),
        ('export_to_video(frames, "teacup.mp4", fps=30)\n', ""),
    ):
        assert old in code
        code = code.replace(old, new)
    names = {}
    exec(compile(code, "page", "exec"), names)
    assert len(names["frames"]) == 7 and names["pipe"].get_active_adapters() == ["my_lora"]


def save_pipeline(folder):
    """The tiny model as a diffusers pipeline; its VAE has random weights."""
    from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel
    from transformers import AutoTokenizer, T5EncoderModel

    from mochi_tune.config.load import weights_folder
    from mochi_tune.weights.folder import WeightsFolder
    from mochi_tune.weights.key_map import diffusers_map

    tiny = weights_folder(load_config("my_lora", ["model=tiny"]))
    dit = WeightsFolder(tiny).load_dit("cpu", torch.float32)
    size = dit.config
    transformer = MochiTransformer3DModel(
        num_attention_heads=size.num_heads, attention_head_dim=size.hidden_size_x // size.num_heads,
        num_layers=size.depth, pooled_projection_dim=size.hidden_size_y, text_embed_dim=size.t5_feat_dim,
    )  # fmt: skip
    transformer.load_state_dict(to_diffusers(dit.state_dict(), diffusers_map(dit)))
    channels = {"encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4}
    vae = AutoencoderKLMochi(**channels, layers_per_block=(1,) * 5)
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    text_encoder = T5EncoderModel.from_pretrained(tiny / "text_encoder")
    tokenizer = AutoTokenizer.from_pretrained(tiny / "tokenizer")
    MochiPipeline(scheduler, vae, text_encoder, tokenizer, transformer).save_pretrained(folder)


def test_an_upload_sends_the_folder_and_keeps_other_files(run_dir, tmp_path, hub, capsys):
    hub.files[REPO] = {"notes.txt": b"mine", "README.md": b"old"}
    hub.visibility[REPO] = "public"
    arguments = [f"adapter={run_dir / 'adapter.safetensors'}", f"push={REPO}", f"out={tmp_path / 'hub'}"]
    assert run_export([*arguments, f"endpoint={hub.address}"]) == 0
    assert hub.files[REPO] == contents(tmp_path / "hub") | {"notes.txt": b"mine"}
    assert set(hub.operations) == {"header", "file", "lfsFile"} and hub.tokens == {"Bearer hf_of_the_test"}
    assert hub.visibility[REPO] == "public"
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.address}/{REPO}"


def test_a_dry_run_uploads_nothing(run_dir, tmp_path, hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    arguments = [f"adapter={run_dir / 'adapter.safetensors'}", f"push={REPO}", f"out={tmp_path / 'hub'}"]
    with pytest.raises(ConfigError, match=r"push=ada/balls needs a login .*: run `hf auth login` first"):
        run_export(arguments)
    assert not (tmp_path / "hub").exists()
    assert run_export([*arguments, "dry_run=true", "dtype=bf16"]) == 0
    assert not hub.tokens and str(tmp_path / "hub" / "README.md") in capsys.readouterr().out
    tensors = load_file(tmp_path / "hub" / "pytorch_lora_weights.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())


def test_a_hub_that_cannot_be_reached_is_one_line_and_the_folder_stays(run_dir, tmp_path, hub):
    hub.close()
    arguments = [f"adapter={run_dir / 'adapter.safetensors'}", f"push={REPO}", f"out={tmp_path / 'hub'}"]
    with pytest.raises(CheckpointError, match=r"hub is complete but was not uploaded .*refused.*`hf upload ada/balls"):
        run_export([*arguments, f"endpoint={hub.address}", "private=false"])
    assert (tmp_path / "hub" / "README.md").exists()


def test_a_hub_that_never_answers_is_one_line_and_the_folder_stays(run_dir, tmp_path, hub, monkeypatch):
    monkeypatch.setattr("mochi_tune.weights.push.TIMEOUT_SECONDS", 0.2)
    arguments = [f"adapter={run_dir / 'adapter.safetensors'}", f"push={REPO}", f"out={tmp_path / 'hub'}"]
    refusal = r"hub is complete but was not uploaded to ada/balls \(.*timed out"
    with silent_hub() as address, pytest.raises(CheckpointError, match=refusal):
        run_export([*arguments, f"endpoint={address}"])
    assert (tmp_path / "hub" / "README.md").exists()


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["push=balls"], "push=balls is not possible: use owner/name"),
        (["push=ada/b--b"], "push=ada/b--b is not possible"),
        (["push=ada/b", "private=yes"], "private=yes is not possible: use true or false"),
        (["push=ada/b", "to=diffusers,comfy"], "to=comfy is not an adapter format"),
        (["push=ada/b", "dtype=int8"], "dtype=int8 is not possible: use fp32, bf16, fp16"),
        (["push=ada/b", "out=a.safetensors"], "out=a.safetensors names a file"),
        (["push=ada/b", "out=."], r"out=\. exists and is never overwritten"),
    ],
)
def test_what_cannot_be_published_is_refused_before_anything_is_made(tmp_path, hub, monkeypatch, more, text):
    monkeypatch.chdir(tmp_path)
    save_adapter(tmp_path / "a.safetensors", random_adapter(ATTENTION))
    with pytest.raises(ConfigError, match=text):
        run_export(["adapter=a.safetensors", *more])
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"] and not hub.tokens


def test_an_export_that_fails_leaves_no_folder(tmp_path):
    save_adapter(tmp_path / "a.safetensors", with_magnitudes(random_adapter(ATTENTION)))
    with pytest.raises(Exception, match="is a DoRA"):
        main(Publication(tmp_path / "a.safetensors", ("diffusers", "comfyui")), tmp_path / "hub")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    main(Publication(tmp_path / "a.safetensors"), tmp_path / "hub")
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "only at strength 1" in text and "ComfyUI has no DoRA format" in text


# train


def test_a_finished_run_is_uploaded_once(run_dir, hub, capsys):
    config = load_config("my_lora", [*road(run_dir, *LORA, *SETTINGS), "name=red balls", f"publish.push={REPO}"])
    assert push_trained(config) == 0
    assert hub.visibility == {REPO: "private"}
    assert hub.files[REPO] == contents(run_dir / "hub" / "step_000003")
    number = len(hub.operations)
    assert push_trained(config) == 0 and len(hub.operations) == number
    assert "is already on ada/balls: nothing is uploaded" in capsys.readouterr().out


def test_a_failed_upload_leaves_the_run_and_names_a_command_that_works(run_dir, tmp_path, hub, monkeypatch):
    """`train` runs in a separate process on a finished run; the command that it names is run unchanged."""
    shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("hub"))
    hub.refuses_objects = True
    env = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    settings = [*road(tmp_path / "run", *LORA, *SETTINGS), "name=red balls", f"publish.push={REPO}"]
    done = subprocess.run(command("train", "conf=my_lora", *settings), capture_output=True, text=True, env=env)
    folder = tmp_path / "run" / "hub" / "step_000003"
    assert done.returncode == 1, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("mochi-tune: ")]
    assert "is trained and saved, but not uploaded" in line and "403" in line
    with monkeypatch.context() as same_machine:
        same_machine.setenv("HF_ENDPOINT", hub.address)
        assert push_trained(load_config("my_lora", settings)) == 1, "the same command tries again"
    hub.refuses_objects = False
    told = shlex.split(line.split("`")[1])
    assert told[:2] == ["hf", "upload"]
    program = [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()"]
    subprocess.run([*program, *told[1:]], check=True, capture_output=True, env=env)
    assert hub.files[REPO] == contents(folder) and hub.visibility == {REPO: "private"}
    hub.files.clear()
    assert push_trained(load_config("my_lora", settings)) == 0 and hub.files[REPO] == contents(folder)


def test_a_run_that_is_to_be_uploaded_needs_a_login_at_its_start(tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"} | {"HF_HOME": str(tmp_path / "hf")}
    settings = road(tmp_path / "run", f"publish.push={REPO}")
    done = subprocess.run(command("train", "conf=my_lora", *settings), capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert (
        done.stderr.startswith("mochi-tune: publish.push=ada/balls needs a login") and not (tmp_path / "run").exists()
    )


@pytest.mark.parametrize("repo", ["balls", "a/b/c", "ada/.b", "ada/b.git", "ada/b--c", "ada/" + "b" * 93, "ada/"])
def test_a_repository_is_owner_and_name(repo):
    with pytest.raises(ConfigError, match=r"publish\.push=.* is not possible: it must be owner/name"):
        load_config("my_lora", [f"publish.push={repo}"])


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["to=comfyui", "private=false"], "private=false is for uploads, and there is no push="),
        (["to=comfyui", "endpoint=http://localhost"], "is for uploads, and there is no push="),
    ],
)
def test_a_file_takes_no_settings_of_an_upload(tmp_path, more, text):
    with pytest.raises(ConfigError, match=text):
        run_export(["adapter=a.safetensors", f"out={tmp_path / 'b.safetensors'}", *more])


def test_damaged_rows_of_a_run_are_ignored(run_dir, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    for name in ("metrics", "validation"):
        with open(copy / f"{name}.jsonl", "a") as file:
            file.write('{"step": 9, "validation_loss": 1, "clips": ["late"]}\n{"loss": 1}\n')
            file.write('{"step": 3, "validation_loss": NaN}\n{')
    adapter = copy / "adapter.safetensors"
    expected, found = read_run(run_dir, run_dir / "adapter.safetensors", 3), read_run(copy, adapter, 3)
    assert (found.losses, found.num_trained, found.seconds) == (expected.losses, 3, expected.seconds)
    assert [step for step, _ in found.losses] == [0, 1, 2, 3]


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for out in (".", "../empty"):
        with pytest.raises(ConfigError, match="is the root or the working folder"):
            main(Publication(tmp_path / "a.safetensors", ("diffusers",), "fp32", "", {}, None), Path(out))


def test_a_file_in_the_home_folder_is_found_and_one_of_the_hub_leaves_its_cache_alone(tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    commit = tmp_path / "cache" / "models--ada--style" / "snapshots" / ("a" * 40)
    commit.mkdir(parents=True)
    save_adapter(commit / "pytorch_lora_weights.safetensors", random_adapter(ATTENTION), "diffusers")
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.joinpath("cache").rglob("*"))
    assert run_export(["adapter=hub:ada/style", "dry_run=true", "license=mit"]) == 0
    assert (tmp_path / "hub" / "style" / "README.md").is_file() and sorted(
        tmp_path.joinpath("cache").rglob("*")
    ) == before
    save_adapter(tmp_path / "own.safetensors", random_adapter(ATTENTION))
    assert run_export(["adapter=~/own.safetensors", "to=diffusers", "out=~/out.safetensors"]) == 0
    assert (tmp_path / "out.safetensors").is_file()
