import errno
import os
import pwd
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_process import run
from helpers_road import SIZES

from mochi_tune.cli.launch import keep_compiled_code
from mochi_tune.cli.main import SURROUNDINGS, advise, describe_trouble, load
from mochi_tune.cli.main import run as run_here
from mochi_tune.cli.options import TOY_OPTIONS, plain_options
from mochi_tune.config.settings import known_keys
from mochi_tune.errors import ConfigError
from mochi_tune.sampling.requests import sampler_settings


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_names_every_verb(arguments):
    command = [sys.executable, "-m", "mochi_tune.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for verb in (
        "inspect",
        "describe",
        "prepare",
        "train",
        "sample",
        "export",
        "lora",
        "verify",
        "weights pull",
        "bench",
        "demo",
    ):
        assert f"mochi-tune {verb}" in done.stdout


@pytest.mark.parametrize("verb", ["inspect", "prepare", "train", "sample"])
def test_a_verbs_help_lists_every_setting(verb):
    short = run(verb, "--help")
    assert short.returncode == 0 and f"For example: mochi-tune {verb} conf=" in short.stdout
    assert len(re.findall(r"^  [\w.]+=", short.stdout, re.MULTILINE)) == 10 + (verb == "train")
    assert ("  memory=80gb " in short.stdout) == (verb != "inspect")
    done = run(verb, "--help", "all")
    assert done.returncode == 0 and f"mochi-tune {verb}" in done.stdout
    for key in known_keys():
        assert re.search(rf"^  {re.escape(key)}=", done.stdout, re.MULTILINE), key
    lines = done.stdout.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("  train.warmup_steps=50 "))
    assert lines[at].endswith("a whole number, 0 or more")
    assert lines[at + 1] == "      steps from 0 to the peak learning rate"


@pytest.mark.parametrize(
    "verb", [["describe"], ["export"], ["lora", "merge"], ["verify"], ["weights", "pull"], ["demo"]]
)
def test_the_other_verbs_have_help(verb):
    done = run(*verb, "--help")
    assert done.returncode == 0 and f"mochi-tune {' '.join(verb)}" in done.stdout


def test_cfg_prints_the_settings_that_would_run():
    done = run("sample", "conf=my_lora", "model=tiny", "prompt=a cat, (fast)", "seed=4", "--cfg")
    assert done.returncode == 0
    assert (
        "prompt: a cat, (fast)" in done.stdout and "seed: 4" in done.stdout and "weights: package:tiny" in done.stdout
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["tarin"], "tarin is not a verb; did you mean train?"),
        (["train"], "train needs conf=NAME: for example conf=my_lora."),
        (
            ["train", "my_lora"],
            "'my_lora' is not a setting: settings are written key=value; did you mean conf=my_lora?",
        ),
        (["sample", "conf=my_lora", "prompt", "a cat"], "did you mean 'prompt=a cat'?"),
        (["sample", "a cat", "conf=my_lora"], "did you mean 'prompt=a cat'?"),
        (["sample", "conf=my_lora", "prompt=a", "cat", "runs", "seeds=1"], 'with spaces, prompt="a cat runs".'),
        (["train", "conf=my_lora", "--steps", "20"], "did you mean train.steps=20?"),
        (["train", "conf=my_lora", "lr", "1e-4"], "did you mean train.learning_rate=1e-4?"),
        (["train", "conf=my_lora", "--train.steps=5"], "did you mean train.steps=5?"),
        (["train", "--conf", "my_lora"], "did you mean conf=my_lora?"),
        (["train", "conf=my_lora", "lr=1e-4"], "lr is not a setting; did you mean train.learning_rate?"),
        (["train", "conf=my_lora", "train.epochs=3"], "set train.steps: the epochs times the clips"),
        (["train", "conf=my_lora", "batch=3"], "did you mean train.batch_size?"),
        (["train", "conf=my_lora", "rank=3"], "did you mean lora.rank?"),
        (["train", "conf=my_lora", "resolution=480"], "did you mean data.height and data.width?"),
        (["train", "conf=my_lora", "--verbose"], "--verbose is not an option"),
        (["train", "conf=my_lora", "train.stesp=3"], "did you mean train.steps?"),
        (["train", "conf=nothing_here"], "conf=nothing_here is neither"),
        (["export", "adapter=x.safetensors"], "export needs to=..., out=..."),
        (["export", "adaptor=x"], "adaptor= is not a setting of export, which takes adapter=, to=, "),
        (["lora", "resize", "x.safetensors", "rnak=4"], "did you mean rank=?"),
        (["verify", "reference=nowhere"], "reference=nowhere lacks dit_io.safetensors"),
        (["verify", "reference=nowhere", "dtype=fp16"], "dtype=fp16 is not possible: use fp32 or bf16."),
        (["weights", "push"], "use `mochi-tune weights pull`"),
        (["sample", "conf=my_lora", "model=tiny", "prompt=", "adapter=none"], "sample.prompt is empty"),
        (["train", "conf=my_lora", "model=tiny", "sample.linear_steps=64"], "does not fit sample.steps=64"),
        (
            ["sample", "conf=my_lora", "model=tiny", "prompt=x", "linear_steps=64", "adapter=none"],
            "does not fit sample.steps=64",
        ),
        (["sample", "conf=my_lora", "prompt=x", "model=tiny"], "is no folder runs/my_lora_tiny: train first"),
        (["sample", "conf=my_lora", "device=cuda", "prompt=x", "model=tiny", "adapter=none"], "device=cuda"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, arguments, text):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert text in done.stderr and done.stderr.count("\n") == 1 and done.stderr.startswith("mochi-tune: ")
    assert not done.stdout and not list(tmp_path.iterdir())


def test_plain_values_are_read_as_a_shell_would(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    read = lambda *words: plain_options("toy clips", list(words), TOY_OPTIONS["clips"])  # noqa: E731
    assert (read("out=~/q") or {})["out"] == f"{tmp_path}/q" and (read("out=a~b") or {})["out"] == "a~b"
    with pytest.raises(ConfigError, match="out= is empty: give a value, or leave it out for out=toy_videos"):
        read("out=")
    with pytest.raises(ConfigError, match=r"'card' has no value: .* did you mean card=4090"):
        run_here(["plan", "conf=my_lora", "card", "4090"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("export films.safetensors to=native", "=; did you mean adapter=films.safetensors?"),
        ("split films out=clips", "timeout_seconds=; did you mean in=films?"),
        ("split in=films out=clips more", "and timeout_seconds=."),
        ("export --force", "and endpoint=."),
        (
            "lora inspect file=a.safetensors",
            "did you mean mochi-tune lora inspect a.safetensors? Files have no key.",
        ),
        ("lora merge lora=hub:a/b", "did you mean mochi-tune lora merge hub:a/b? Files have no key."),
        (f"lora inspect foo={'A' * 300}", "foo= is not a setting of lora inspect, which takes out= and json=."),
        ("lora bake device=cuda", "and dtype=."),
        ("weights check folder", "'folder' is not a setting of weights check; did you mean model.weights=folder?"),
        ("weights pull endpoint=hub", "endpoint=hub is not an address: use one like https://huggingface.co."),
        ("export adapter=a push=a/b endpoint=hub", "use one like https://huggingface.co."),
        # Without asking for a login first.
        ("export adapter=a push=a", "push=a is not possible: use owner/name, of letters, digits, -, . and _."),
        ("merge a b", "merge is not a verb; did you mean lora merge?"),
    ],
)
def test_what_may_be_meant_is_suggested(arguments, text):
    with pytest.raises(ConfigError) as caught:
        run_here(arguments.split())
    assert str(caught.value).endswith(text)


@pytest.mark.parametrize("verb", ["prepare", "train", "sample"])
def test_missing_weights_name_the_command_that_fetches_them(tmp_path, verb):
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "a.mp4").write_bytes(b"")
    (videos / "a.txt").write_text("a")
    more = ["prompt=x", "adapter=none"] if verb == "sample" else []
    done = run(verb, "conf=my_lora", *more, "model.weights=none", cwd=tmp_path)
    assert done.returncode == 2
    assert "mochi-tune weights pull" in done.stderr and done.stderr.count("\n") == 1


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    arguments = [
        "prompt=x",
        "adapter=none",
        "model=tiny",
        "sample.steps=2",
        "sample.num_frames=1",
        "sample.height=16",
        "sample.width=16",
    ]
    done = run("sample", "conf=my_lora", *arguments, f"run_dir={tmp_path / 'file'}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Not a directory" in done.stderr


@pytest.mark.parametrize(
    ("number", "name", "said"),
    [
        (errno.ENOSPC, "a\x1b[31m", r"a\x1b[31m: No space left on device: choose another path."),
        (
            errno.EAGAIN,
            None,
            "no process can be started: raise `ulimit -u`, or the limit of the container.",
        ),
        (errno.ESTALE, "a", "a: Stale file handle: check the disk, or its network, and run the same command again."),
        (errno.EBADF, "a", None),
    ],
)
def test_trouble_with_the_system_is_one_line(number, name, said):
    assert describe_trouble(OSError(number, os.strerror(number), name)) == said


def test_advice_on_memory_names_settings_of_the_verb():
    assert "memory.tiles" in advise(["sample"]) and "train." not in advise(["sample"])
    assert "train.batch_size" in advise(["train"]) and "sample." not in advise(["train"])


def test_a_preset_on_the_command_line_stands_in_the_place_of_the_files_own_schedule():
    config = load("sample", ["conf=toy_lora", "prompt=x", "preset=fast", "steps=6"])
    assert config is not None
    settings = sampler_settings(config.sample)
    assert (settings.steps, settings.guidance, settings.threshold) == (6, 1.5, 0.1)
    with pytest.raises(ConfigError, match="both given"):
        load("sample", ["conf=toy_lora", "prompt=x", "prompts=y.txt"])


@pytest.mark.parametrize("seconds", ["", "0.01"])
def test_bars_in_a_log_file_are_drawn_now_and_then(tmp_path, seconds):
    program = (
        "import time; from mochi_tune.cli.stdio import slow_bars; slow_bars(); from tqdm import tqdm\n"
        "for _ in tqdm(range(100)): time.sleep(0.01)"
    )
    with open(tmp_path / "log", "w") as log:
        asked = {"TQDM_MININTERVAL": seconds} if seconds else {}
        subprocess.run([sys.executable, "-c", program], stderr=log, env=os.environ | asked, check=True)
    drawings = (tmp_path / "log").read_bytes().split(b"\r")
    assert b"100/100" in drawings[-1]
    # Whoever asks for more gets more.
    assert len(drawings) > 10 if seconds else len(drawings) <= 4


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        ("train", "interrupted; the checkpoints are kept, and the same command continues the run"),
        ("plan", "interrupted"),
    ],
)
def test_ctrl_c_during_the_start_says_that_a_run_continues(tmp_path, verb, said):
    program = f"""
import os

import mochi_tune.cli.main as program

def stop(*_):
    print(os.environ["PYTHONSAFEPATH"])
    raise KeyboardInterrupt

program.run = stop
program.main(["{verb}"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout == "1\n", "what it starts imports nothing from the working folder"
    assert done.returncode == 130 and done.stderr.endswith(f"mochi-tune: {said}\n")


def test_python_says_what_the_surroundings_lack_in_these_words(monkeypatch):
    def refuse(*_):
        raise KeyError

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", refuse)
    with pytest.raises(RuntimeError) as error:
        Path.home()
    assert str(error.value) in SURROUNDINGS
    keep_compiled_code()


def test_a_deterministic_training_sets_what_libraries_read_when_they_start(tmp_path, monkeypatch):
    for name in ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    settings = [*SIZES, f"run_dir={tmp_path}", "train.deterministic=true"]
    assert run_here(["train", "conf=my_lora", *settings], recipe=lambda _config, _processes: 2) == 2
    # The option in the program would not reach the threads in which autograd compiles.
    assert os.environ["TORCHINDUCTOR_DETERMINISTIC"] == "1" and os.environ["CUBLAS_WORKSPACE_CONFIG"]
