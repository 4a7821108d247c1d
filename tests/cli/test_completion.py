import contextlib
import subprocess

import pytest

from mochi_tune.cli.completion import SHELLS, collect
from mochi_tune.cli.main import run
from mochi_tune.cli.options import USAGE
from mochi_tune.config.settings import known_keys
from mochi_tune.errors import ConfigError

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
    ],
)
def test_bash_completes(script, line, expected):
    assert completed(script, line) == expected


def test_bash_knows_the_files_in_conf(script, tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "teacups.yaml").touch()
    assert completed(script, "mochi-tune train conf=te", tmp_path) == ["teacups"]
    assert "my_lora" in completed(script, "mochi-tune train conf=my", tmp_path)


def test_a_word_that_is_not_divided_comes_back_whole(script):
    assert completed(script, "mochi-tune sample preset=fas", breaks="whole") == ["preset=fast", "preset=fastmochi"]


def test_every_verb_and_every_setting_is_completed():
    words = collect()
    assert {line.split()[1] for line in USAGE.splitlines() if line.startswith("  mochi-tune ")} == words.verbs.keys()
    for verb in ("prepare", "train", "sample"):
        assert {f"{key}=" for key in known_keys()} <= set(words.verbs[verb])


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_has_a_script_that_names_verbs_and_values(shell, capsys):
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "train.learning_rate=" in script and "fastmochi" in script and "experiment" in script


def test_another_shell_is_refused():
    with pytest.raises(ConfigError, match="one of bash, zsh, fish, got tcsh"):
        run(["completion", "tcsh"])
