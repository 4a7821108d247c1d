"""The verb `completion`: prints a shell script that completes verbs, settings and their allowed values."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

from mochi_tune.cli import options
from mochi_tune.cli.lora import FILES
from mochi_tune.errors import ConfigError

# The verbs that take a configuration file.
RUN_VERBS = ("plan", "inspect", "prepare", "train", "sample")
PLAIN = {
    "split": options.SPLIT_OPTIONS,
    "filter": options.FILTER_OPTIONS,
    "doctor": options.DOCTOR_OPTIONS,
    "describe": options.DESCRIBE_OPTIONS,
    "replay": options.REPLAY_OPTIONS,
    "export": options.EXPORT_OPTIONS,
    "verify": options.VERIFY_OPTIONS,
    "bench": options.BENCH_OPTIONS,
    "demo": options.DEMO_OPTIONS,
    "experiment": options.EXPERIMENT_OPTIONS,
    "ui": options.UI_OPTIONS,
}
# The verbs with subverbs, and the settings of these.
NESTED: dict[str, Mapping[str, Mapping[str, tuple[str | None, str]]]] = {
    "lora": options.LORA_OPTIONS,
    "weights": {"pull": options.PULL_OPTIONS, "check": {}},
    "toy": options.TOY_OPTIONS,
}
# The verbs that take files without a key.
TAKE_FILES = ("replay", *(f"lora {name}" for name in FILES))
# Settings with few allowed values, of verbs without a configuration file. Tests compare them with the verbs.
PLAIN_VALUES = {
    "export:to": ("official", "diffusers", "comfyui", "kohya", "native"),
    "export:dtype": ("fp32", "bf16", "fp16"),
    "lora:to": ("official", "diffusers"),
    "lora:dtype": ("bf16", "fp16", "fp32"),
    "lora:targets": ("attention", "attention_mlp"),
    "weights:source": ("official", "diffusers", "comfyui"),
    "weights:precision": ("bf16", "fp32", "fp8"),
    "split:detector": ("adaptive", "content", "threshold"),
    "verify:dtype": ("fp32", "bf16"),
    "bench:what": ("sample", "decode", "encode", "train"),
    "bench:model": ("mochi_1", "toy", "tiny"),
    "bench:memory": ("80gb", "48gb", "24gb", "16gb", "12gb"),
    "bench:dtype": ("fp32", "bf16"),
    "bench:recompute": ("auto", "none", "attention", "block"),
    "bench:precision": ("bf16", "fp8", "int8", "nf4"),
    "experiment:what": options.EXPERIMENTS,
    "run:card": ("h200", "h100", "a100", "a100-40", "l40s", "a6000", "5090", "4090", "3090", "4080", "3060"),
}  # fmt: skip
SHELLS = ("bash", "zsh", "fish")
BOOL = ("true", "false")


@dataclass(frozen=True)
class Words:
    """The words that can be completed.

    Attributes:
        verbs: verb -> its settings as KEY=, its options and its subverbs; "VERB SUBVERB" -> the settings of that.
        values: VERB:KEY -> allowed values, for settings with few; the verb is "run" for all of RUN_VERBS, and subverbs
            share those of their verb.
    """

    verbs: dict[str, tuple[str, ...]]
    values: dict[str, tuple[str, ...]]


def run_completion(arguments: list[str]) -> int:
    """Prints the completion script of a shell."""
    if "--help" in arguments or "-h" in arguments:
        print("mochi-tune completion bash|zsh|fish: prints a script of completions")
        print("bash, zsh: source <(mochi-tune completion bash); fish: mochi-tune completion fish | source")
        return 0
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise ConfigError(f"completion takes one of {', '.join(SHELLS)}, got {' '.join(arguments) or 'none'}.")
    print({"bash": bash, "zsh": zsh, "fish": fish}[arguments[0]](collect()), end="")
    return 0


def collect() -> Words:
    """Collects verbs and settings from where they are declared."""
    from mochi_tune.config.docs import packaged_files
    from mochi_tune.config.load import SAMPLE_ALIASES, packaged_folder
    from mochi_tune.config.settings import known_keys

    groups = {group: tuple(files) for group, files in packaged_files().items()}
    values = {f"run:{group}": names for group, names in groups.items()}
    values["run:conf"] = tuple(sorted(path.stem for path in packaged_folder().glob("*.yaml")))
    for key, setting in known_keys().items():
        choices = setting.choices or (BOOL if bool in (setting.type, *get_args(setting.type)) else ())
        if choices:
            values[f"run:{key}"] = tuple("null" if choice is None else choice for choice in choices)
    values |= {
        f"run:{alias}": values[f"run:sample.{alias}"] for alias in SAMPLE_ALIASES if f"run:sample.{alias}" in values
    }
    keys = ("conf", *groups, *known_keys())
    verbs: dict[str, tuple[str, ...]] = {verb: (*(f"{key}=" for key in keys), "--cfg") for verb in RUN_VERBS}
    verbs["plan"] += ("card=", "card_gib=")
    verbs["inspect"] += ("out=",)
    verbs["sample"] = tuple(f"{alias}=" for alias in SAMPLE_ALIASES) + verbs["sample"]
    for verb, known in PLAIN.items():
        verbs[verb] = tuple(f"{key}=" for key in known)
        values |= _plain_values(verb, known)
    for verb, nested in NESTED.items():
        verbs[verb] = tuple(nested)
        for name, known in nested.items():
            verbs[f"{verb} {name}"] = tuple(f"{key}=" for key in known)
            values |= _plain_values(verb, known)
    # `weights check` is without settings of its own: it takes those of a run that name weights.
    verbs["weights check"] = tuple(f"{key}=" for key in keys if key in ("conf", "model") or key.startswith("model."))
    values |= {f"weights:{key}": values[f"run:{key}"] for key in ("conf", "model")}
    verbs |= {"init": (), "completion": SHELLS}
    values |= PLAIN_VALUES
    return Words(verbs, values)


def _plain_values(verb: str, known: Mapping[str, tuple[str | None, str]]) -> dict[str, tuple[str, ...]]:
    values: dict[str, tuple[str, ...]] = {
        f"{verb}:{key}": BOOL for key, (default, _) in known.items() if default in BOOL
    }
    return values | ({f"{verb}:device": ("cpu", "cuda", "auto")} if "device" in known else {})


def _by_value(values: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields the keys with the same values as a pattern of `case`, and these values."""
    for shared in dict.fromkeys(values.values()):
        yield "|".join(key for key, own in values.items() if own == shared), shared


def _cases(rows: Iterable[tuple[str, str]], indent: str) -> str:
    return "\n".join(f"{indent}{pattern}) {line} ;;" for pattern, line in rows)


def bash(words: Words) -> str:
    """Returns the script for bash, which splits words at = where COMP_WORDBREAKS contains it."""
    keys = _cases(((f'"{verb}"', f'keys="{" ".join(own)}"') for verb, own in words.verbs.items()), " " * 8)
    values = _cases(((keys, f'values="{" ".join(own)}"') for keys, own in _by_value(words.values)), " " * 8)
    return f"""\
# mochi-tune's completion for bash: source <(mochi-tune completion bash)
_mochi_tune() {{
    local line="${{COMP_LINE:0:COMP_POINT}}" verb="${{COMP_WORDS[1]}}" family="${{COMP_WORDS[1]}}"
    local word="${{line##*[[:space:]]}}" keys="" values="" file
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{" ".join(_first_words(words))}" -- "$word"))
        return
    fi
    case "$verb" in
        {"|".join(RUN_VERBS)}) family=run ;;
        {"|".join(NESTED)}) [ "$COMP_CWORD" -eq 2 ] || verb="$verb ${{COMP_WORDS[2]}}" ;;
    esac
    case "$word" in
    *=*)
        case "$family:${{word%%=*}}" in
{values}
        esac
        if [ "${{word%%=*}}" = conf ]; then
            for file in conf/*.yaml; do
                file="${{file##*/}}" && [ "$file" != "*.yaml" ] && values="$values ${{file%.yaml}}"
            done
        fi
        COMPREPLY=($(compgen -W "$values" -- "${{word#*=}}"))
        case "$COMP_WORDBREAKS" in *=*) ;; *) COMPREPLY=("${{COMPREPLY[@]/#/${{word%%=*}}=}}") ;; esac
        ;;
    *)
        case "$verb" in
{keys}
        esac
        COMPREPLY=($(compgen -W "$keys" -- "$word"))
        case "${{COMPREPLY[0]-}}" in *=) compopt -o nospace 2>/dev/null ;; esac
        # Without any reply, bash itself completes files.
        case "${{COMPREPLY[0]+$verb}}" in {"|".join(f'"{verb}"' for verb in TAKE_FILES)})
            while IFS= read -r file; do COMPREPLY+=("$file"); done < <(compgen -f -- "$word") ;;
        esac
        ;;
    esac
}}
complete -o default -F _mochi_tune mochi-tune
"""


def zsh(words: Words) -> str:
    """Returns the script for zsh, which starts the completion system if needed."""
    keys = _cases(((f'("{verb}"', f"keys=({' '.join(own)})") for verb, own in words.verbs.items()), " " * 8)
    values = _cases(((f"({keys}", f"values=({' '.join(own)})") for keys, own in _by_value(words.values)), " " * 8)
    return f"""\
# mochi-tune's completion for zsh: source <(mochi-tune completion zsh)
(( $+functions[compdef] )) || {{ autoload -U compinit && compinit }}
_mochi_tune() {{
    local verb="$words[2]" family="$words[2]" key
    local -a keys values
    if (( CURRENT == 2 )); then
        compadd -- {" ".join(_first_words(words))}
        return
    fi
    case "$verb" in
        ({"|".join(RUN_VERBS)}) family=run ;;
        ({"|".join(NESTED)}) (( CURRENT == 3 )) || verb="$verb $words[3]" ;;
    esac
    if [[ "$PREFIX" == *=* ]]; then
        key="${{PREFIX%%=*}}"
        compset -P '*='
        case "$family:$key" in
{values}
        esac
        if [[ "$key" == conf ]]; then
            compadd -- $values conf/*.yaml(N:t:r) || _files
        elif (( $#values )); then compadd -- $values; else _files; fi
    else
        case "$verb" in
{keys}
        esac
        compadd -S '' -- ${{(M)keys:#*=}}
        compadd -- ${{keys:#*=}}
        case "$verb" in ({"|".join(f'"{verb}"' for verb in TAKE_FILES)}) _files ;; esac
    fi
}}
compdef _mochi_tune mochi-tune
"""


def fish(words: Words) -> str:
    """Returns the script for fish, which completes a setting with its value as one word."""
    lines = [
        "# mochi-tune's completion for fish: mochi-tune completion fish | source",
        "# Whether the words before the last one match a pattern, and the last one another, if that is given.",
        "function __mochi_tune_at",
        "    set -l before (commandline -opc)",
        "    set -e before[1]",
        '    string match -qr -- "^($argv[1])\\$" "$before"; or return',
        '    test (count $argv) -eq 1; or string match -qr -- "^($argv[2])" (commandline -ct)',
        "end",
        _fish_line("", f"-f -a '{' '.join(_first_words(words))}'"),
    ]
    families: dict[str, list[str]] = {}
    for key in words.values:
        family, _, name = key.partition(":")
        # A path may follow conf= and move= too.
        families.setdefault(family, []).extend([] if name in ("conf", "move") else [f"{name}="])
    for verb, keys in words.verbs.items():
        is_run, first = verb in RUN_VERBS, verb.partition(" ")[0]
        closed = families.get("run" if is_run else first, [])
        # No verb but those with files takes a word without =.
        closed = closed if verb in TAKE_FILES else [*closed, "[^=]*\\$"]
        after = verb if verb in NESTED or verb == "completion" else f"{verb}( .*)?"
        if closed:
            lines.append(_fish_line(after, "-f", "|".join(closed)))
        full = []
        for key in keys:
            values = words.values.get(f"{'run' if is_run else first}:{key.rstrip('=')}", ("",))
            full += [key + value for value in (values if key.endswith("=") else ("",))]
        if full:
            lines.append(_fish_line(after, f"-a '{' '.join(word for word in full if not word.startswith('--'))}'"))
        if "--cfg" in full:
            lines.append(_fish_line(after, "-l cfg"))
        if "conf=" in keys:
            names = "(for file in conf/*.yaml; echo conf=(basename $file .yaml); end)"
            lines.append(_fish_line(after, f"-a '{names}'"))
    return "\n".join(lines) + "\n"


def _fish_line(after: str, what: str, word: str = "") -> str:
    """Returns the line that completes `what` after words that match a pattern, in a word that matches another."""
    at = f'__mochi_tune_at "{after}" "{word}"' if word else f'__mochi_tune_at "{after}"'
    return f"complete -c mochi-tune -n '{at}' {what}"


def _first_words(words: Words) -> list[str]:
    return [verb for verb in words.verbs if " " not in verb]
