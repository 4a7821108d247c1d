import contextlib
import itertools
import os
import shutil
import subprocess

import pytest

from mochi_tune.adapters.files import FORMATS
from mochi_tune.cli.completion import PLAIN_VALUES, SHELLS, collect
from mochi_tune.cli.main import run
from mochi_tune.cli.options import USAGE
from mochi_tune.config.load import load_config
from mochi_tune.config.settings import known_keys
from mochi_tune.data_prep.scenes import DETECTORS
from mochi_tune.errors import ConfigError
from mochi_tune.parallel.forecast import CARDS
from mochi_tune.parallel.precision import NEEDS
from mochi_tune.parallel.recompute import POLICIES
from mochi_tune.recipes.bench import MODELS, WHAT
from mochi_tune.toy.arms import arms

# What readline does of a line: it divides the words at spaces and, as bash is set up by itself, at =.
ASK = """
source "$1"; COMP_LINE="$2"; COMP_POINT=${#COMP_LINE}; COMP_WORDS=($3); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
[ "$4" = whole ] && COMP_WORDBREAKS=" "
_mochi_tune; printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "mochi-tune.bash"
    with open(path, "w") as file, contextlib.redirect_stdout(file):
        assert run(["completion", "bash"]) == 0
    return path


def completed(script, line: str, cwd=None, breaks: str = "divided") -> list[str]:
    words = line.replace("=", " = ") if breaks == "divided" else line
    done = subprocess.run(
        ["bash", "-c", ASK, "bash", script, line, words, breaks], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert not done.stderr, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mochi-tune pre", ["prepare"]),
        ("mochi-tune train train.batch", ["train.batch_size="]),
        ("mochi-tune sample adapter_a", ["adapter_alpha="]),
        ("mochi-tune sample conf=my_lora preset=fas", ["fast", "fastmochi"]),
        ("mochi-tune train log.trackio=t", ["true"]),
        ("mochi-tune train memory=1", ["12gb", "16gb"]),
        ("mochi-tune lora me", ["merge"]),
        ("mochi-tune lora merge fi", []),
        ("mochi-tune weights pull dry_run=f", ["false"]),
        ("mochi-tune completion f", ["fish"]),
        ("mochi-tune export to=", list(FORMATS)),
        ("mochi-tune bench what=t", ["train"]),
        ("mochi-tune lora inspect re", []),
        ("mochi-tune lora resize ran", ["rank="]),
        ("mochi-tune weights check model.w", ["model.weights="]),
        ("mochi-tune plan --c", ["--cfg"]),
        ("mochi-tune plan card=40", ["4090", "4080"]),
    ],
)
def test_bash_completes(script, line, expected):
    assert completed(script, line) == expected


def test_the_listed_values_are_those_that_the_verbs_take():
    assert PLAIN_VALUES["export:to"] == FORMATS
    assert PLAIN_VALUES["bench:what"] == WHAT and PLAIN_VALUES["bench:model"] == MODELS
    assert PLAIN_VALUES["bench:recompute"] == ("auto", *POLICIES)
    assert PLAIN_VALUES["bench:precision"] == ("bf16", *NEEDS)
    assert PLAIN_VALUES["split:detector"] == DETECTORS
    assert set(PLAIN_VALUES["experiment:what"]) == {*arms(), "guidance"}
    assert PLAIN_VALUES["run:card"] == tuple(CARDS)
    for name in PLAIN_VALUES["bench:memory"]:
        assert load_config("base", [f"memory={name}"]).memory.dit


def test_bash_knows_the_files_in_conf(script, tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "teacups.yaml").touch()
    for verb in ("train", "weights check"):
        assert completed(script, f"mochi-tune {verb} conf=te", tmp_path) == ["teacups"]
    assert "my_lora" in completed(script, "mochi-tune train conf=my", tmp_path)
    (tmp_path / "old one.safetensors").touch()
    assert completed(script, "mochi-tune lora inspect o", tmp_path) == ["out=", "old", "one.safetensors"]
    assert completed(script, "mochi-tune train o", tmp_path) == []


def test_a_word_that_is_not_divided_comes_back_whole(script):
    assert completed(script, "mochi-tune sample preset=fas", breaks="whole") == ["preset=fast", "preset=fastmochi"]


def test_every_verb_and_every_setting_is_completed():
    words = collect()
    verbs = {line.split()[1] for line in USAGE.splitlines() if line.startswith("  mochi-tune ")}
    assert verbs == {verb.partition(" ")[0] for verb in words.verbs}
    for verb in ("prepare", "train", "sample"):
        assert {f"{key}=" for key in known_keys()} <= set(words.verbs[verb])


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_has_a_script_that_names_verbs_and_values(shell, capsys):
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "train.learning_rate=" in script and "fastmochi" in script and "experiment" in script


# What Tab leaves of each line, in a zsh that runs in a terminal of its own.
ASK_ZSH = """
zmodload zsh/zpty
script=$1; shift
zpty child zsh -f -i
zpty -w child "source $script"
zpty -w child 'told() { print -r -- "$BUFFER" >> told; zle kill-whole-line }; zle -N told; bindkey "^O" told'
for line in "$@"; do zpty -n -w child "$line"$'\\t\\x0f'; done
zpty -w child exit
while zpty -r child _; do :; done
"""
TAB = {
    "mochi-tune pre": "mochi-tune prepare ",
    "mochi-tune train train.batch": "mochi-tune train train.batch_size=",
    "mochi-tune sample conf=te": "mochi-tune sample conf=teacups ",
    "mochi-tune sample preset=fas": "mochi-tune sample preset=fast",
    "mochi-tune lora me": "mochi-tune lora merge ",
    "mochi-tune weights pull dry_run=f": "mochi-tune weights pull dry_run=false ",
    "mochi-tune export adapter=te": "mochi-tune export adapter=teacups.safetensors ",
    "mochi-tune lora inspect te": "mochi-tune lora inspect teacups.safetensors ",
    "mochi-tune weights check model.w": "mochi-tune weights check model.weights=",
    "mochi-tune train conf=../conf_of_others/t": "mochi-tune train conf=../conf_of_others/tea.yaml ",
    "mochi-tune export to=com": "mochi-tune export to=comfyui ",
    "mochi-tune plan --c": "mochi-tune plan --cfg ",
}


@pytest.fixture
def folder(tmp_path):
    for file in ("mine/conf/teacups.yaml", "mine/teacups.safetensors", "mine/comfy", "conf_of_others/tea.yaml"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    return tmp_path / "mine"


@pytest.mark.skipif(not shutil.which("zsh"), reason="CI installs zsh")
def test_zsh_completes(folder, capsys):
    run(["completion", "zsh"])
    (folder / ".script").write_text(capsys.readouterr().out)
    asked = subprocess.run(
        ["zsh", "-f", "-c", ASK_ZSH, "zsh", ".script", *TAB], cwd=folder, env={**os.environ, "ZDOTDIR": str(folder)},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    assert dict(zip(TAB, (folder / "told").read_text().splitlines(), strict=True)) == TAB


def common_start(words: list[str]) -> str:
    letters = itertools.takewhile(lambda those: len(set(those)) == 1, zip(*words, strict=False))
    return "".join(each[0] for each in letters)


@pytest.mark.skipif(not shutil.which("fish"), reason="CI installs fish")
def test_fish_completes(folder, capsys):
    run(["completion", "fish"])
    (folder / ".script").write_text(capsys.readouterr().out)
    # fish gives all that fits; Tab takes what they have in common.
    ask = "source .script; for line in $argv; complete -C $line | string split -f 1 \\t | string join ' '; end"
    (folder / "rungs").mkdir()
    folders = {f"mochi-tune {each}=rung": f"mochi-tune {each}=rungs/" for each in ("filter move", "train conf")}
    lines = TAB | folders
    asked = subprocess.run(
        ["fish", "--no-config", "-c", ask, *lines], cwd=folder, env={**os.environ, "HOME": str(folder)},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert not asked.stderr
    for (line, after), found in zip(lines.items(), asked.stdout.splitlines(), strict=True):
        whole = line.rpartition(" ")[0]
        assert f"{whole} {common_start(found.split())}" == after.rstrip(), found


def test_another_shell_is_refused(capsys):
    assert run(["completion", "--help", "all"]) == 0 and "completion fish | source" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="one of bash, zsh, fish, got tcsh"):
        run(["completion", "tcsh"])
