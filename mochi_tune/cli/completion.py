"""The verb `completion`: prints a shell script that completes verbs, settings and their allowed values."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

from mochi_tune.cli import options
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
}  # fmt: skip
SHELLS = ("bash", "zsh", "fish")
BOOL = ("true", "false")


@dataclass(frozen=True)
class Words:
    """The words that can be completed.

    Attributes:
        verbs: verb -> its settings as KEY=, and its subverbs.
        values: VERB:KEY -> allowed values, for settings with few; the verb is "run" for all of RUN_VERBS.
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
    verbs = {verb: tuple(f"{key}=" for key in keys) for verb in RUN_VERBS}
    verbs["plan"] += ("card=", "card_gib=")
    verbs["inspect"] += ("out=",)
    verbs["sample"] = tuple(f"{alias}=" for alias in SAMPLE_ALIASES) + verbs["sample"]
    for verb, known in PLAIN.items():
        verbs[verb] = tuple(f"{key}=" for key in known)
        values |= _plain_values(verb, known)
    for verb, nested in NESTED.items():
        own = dict.fromkeys(f"{key}=" for known in nested.values() for key in known)
        verbs[verb] = (*nested, *own)
        for known in nested.values():
            values |= _plain_values(verb, known)
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
    keys = _cases(((verb, f'keys="{" ".join(own)}"') for verb, own in words.verbs.items()), " " * 8)
    values = _cases(((keys, f'values="{" ".join(own)}"') for keys, own in _by_value(words.values)), " " * 8)
    return f"""\
# mochi-tune's completion for bash: source <(mochi-tune completion bash)
_mochi_tune() {{
    local line="${{COMP_LINE:0:COMP_POINT}}" verb="${{COMP_WORDS[1]}}" family="${{COMP_WORDS[1]}}"
    local word="${{line##*[[:space:]]}}" keys="" values="" file
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{" ".join(words.verbs)}" -- "$word"))
        return
    fi
    case "$verb" in {"|".join(RUN_VERBS)}) family=run ;; esac
    case "$word" in
    *=*)
        case "$family:${{word%%=*}}" in
{values}
        esac
        if [ "$family:${{word%%=*}}" = run:conf ]; then
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
        ;;
    esac
}}
complete -o default -F _mochi_tune mochi-tune
"""


def zsh(words: Words) -> str:
    """Returns the script for zsh, which starts the completion system if needed."""
    keys = _cases(((f"({verb}", f"keys=({' '.join(own)})") for verb, own in words.verbs.items()), " " * 8)
    values = _cases(((f"({keys}", f"values=({' '.join(own)})") for keys, own in _by_value(words.values)), " " * 8)
    return f"""\
# mochi-tune's completion for zsh: source <(mochi-tune completion zsh)
(( $+functions[compdef] )) || {{ autoload -U compinit && compinit }}
_mochi_tune() {{
    local verb="$words[2]" family="$words[2]" key
    local -a keys values
    if (( CURRENT == 2 )); then
        compadd -- {" ".join(words.verbs)}
        return
    fi
    case "$verb" in ({"|".join(RUN_VERBS)}) family=run ;; esac
    if [[ "$PREFIX" == *=* ]]; then
        key="${{PREFIX%%=*}}"
        compset -P '*='
        case "$family:$key" in
{values}
        esac
        [[ "$family:$key" == run:conf ]] && values+=(conf/*.yaml(N:t:r))
        if (( $#values )); then compadd -- $values; else _files; fi
    else
        case "$verb" in
{keys}
        esac
        compadd -S '' -- ${{(M)keys:#*=}}
        compadd -- ${{keys:#*=}}
        [[ "$family" == run ]] || _files
    fi
}}
compdef _mochi_tune mochi-tune
"""


def fish(words: Words) -> str:
    """Returns the script for fish, which completes a setting with its value as one word."""
    lines = [
        "# mochi-tune's completion for fish: mochi-tune completion fish | source",
        f"complete -c mochi-tune -n __fish_use_subcommand -f -a '{' '.join(words.verbs)}'",
    ]
    for verb, keys in words.verbs.items():
        family = "run" if verb in RUN_VERBS else verb
        full = []
        for key in keys:
            values = words.values.get(f"{family}:{key.rstrip('=')}", ("",)) if key.endswith("=") else ("",)
            full += [key + value for value in values]
        if full:
            lines.append(f"complete -c mochi-tune -n '__fish_seen_subcommand_from {verb}' -a '{' '.join(full)}'")
    local = "(for file in conf/*.yaml; echo conf=(basename $file .yaml); end)"
    lines.append(f"complete -c mochi-tune -n '__fish_seen_subcommand_from {' '.join(RUN_VERBS)}' -a '{local}'")
    return "\n".join(lines) + "\n"
