"""The help of the command line, and the settings of the verbs that have no configuration file."""

import difflib
import os
import re
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mochi_tune.cli.launch import num_processes_here
from mochi_tune.cli.short_help import check_form, short_help
from mochi_tune.errors import ConfigError

if TYPE_CHECKING:
    from mochi_tune.config.schema import RunConfig

USAGE = """\
mochi-tune trains LoRAs for Mochi 1 on a folder of videos, and renders with them.

  mochi-tune split   in=FOOTAGE out=DIR [detector=adaptive|content|threshold max_seconds=6 ...]
                     footage -> one clip per scene, with a table and a contact sheet
  mochi-tune filter  videos=DIR [out=DIR] [max_black=0.1 ...] [move=true|DIR] | undo=true
                     finds black, frozen, blurred, still, bordered and duplicate clips; moves them on request
  mochi-tune plan    conf=NAME [card=4090 | card=NAME card_gib=24] [key=value ...]
                     estimates memory, time and disk of a run before anything is loaded
  mochi-tune doctor  [device=auto]                checks this machine, and says how to fix what is missing
  mochi-tune init    NAME                         writes conf/NAME.yaml, with comments, and videos/ with a README
  mochi-tune inspect conf=NAME [out=DIR] [key=value ...]      the clips as the model will see them -> a page
  mochi-tune describe videos=DIR endpoint=http://localhost:8000/v1 model=NAME [dry_run=true]
                     captions clips that have none by a vision model; endpoint=local model=DIR
  mochi-tune prepare conf=NAME [key=value ...]    videos and captions -> cache, once
  mochi-tune train   conf=NAME [key=value ...]    cache -> run folder with adapter.safetensors; the same command resumes
  mochi-tune replay  BUNDLE [device=auto]         recomputes a step that `train` refused, sample by sample
  mochi-tune sample  conf=NAME prompt="..." [adapter=FILE adapter_strength=X seed=N out=FILE save_latents=true]
                     or prompts=FILE [seeds=0,1 grid=true compare=base parallel.num_processes=N memory=24gb]
  mochi-tune export  adapter=FILE to=official|diffusers|comfyui|kohya|native out=FILE [dtype=bf16]
                     or push=OWNER/NAME: uploads to the Hugging Face hub with a model card; dry_run=true: no upload
  mochi-tune lora    inspect FILE [out=FILE.html] | compare FILE FILE | merge FILE FILE [strengths=[0.8,0.5]] out=FILE
                     | resize FILE rank=R|energy=0.99 out=FILE | bake FILE model.weights=DIR out=DIR
                     | extract base=DIR tuned=DIR rank=R out=FILE
  mochi-tune ui      [folder=.] [port=7860] [host=127.0.0.1 password=...]      all verbs as a page in the browser
  mochi-tune weights pull [source=official|diffusers|comfyui to=DIR]        fetch the weights, checked by sha256
                     | check [model.weights=DIR|FILE]         which weights are there, and what each verb lacks
  mochi-tune verify  [reference=DIR] [device=cpu] [dtype=fp32|bf16] [parallel.num_processes=N]
  mochi-tune bench   what=sample|decode|encode|train [model=mochi_1] [num_frames=37] speed and memory, on random weights
  mochi-tune demo    [out=DIR]                    teaches the embedded toy model a new motion -> a page
  mochi-tune experiment what=objective|layers|… [seeds=N] [out=DIR]       compares training settings on the toy model
  mochi-tune toy     clips [out=DIR] | weights [work=DIR] [out=DIR]      draws the demo's clips | trains the toy model
  mochi-tune completion bash|zsh|fish             a script that completes verbs, settings and values in a shell

conf=NAME is conf/NAME.yaml in this folder, else the packaged file of that name, else a path. VERB --help lists the
most important settings, and VERB --help all lists every one. Verbs with conf= take --cfg to print the resolved
settings without running.
"""

SPLIT_OPTIONS = {
    "in": (None, "film, or folder of films and folders"),
    "out": (None, "folder of the clips; the table and the contact sheet go to OUT_split next to it"),
    "detector": ("adaptive", "adaptive, content or threshold (fades to black), of PySceneDetect"),
    "threshold": ("", "threshold of the detector; empty: its default, 3, 27 or 12"),
    "margin_seconds": ("0.1", "seconds left out on each side of a cut"),
    "min_seconds": ("1.25", "shorter scenes give no clip"),
    "max_seconds": ("6", "longer scenes are divided"),
    "crf": ("12", "quality of the clips by x264, 0 (lossless) to 51"),
    "timeout_seconds": ("300", "seconds without a decoded frame until a film is refused"),
}
FILTER_OPTIONS = {
    "videos": (None, "folder of clips"),
    "out": ("", "folder of the table and the page; default: VIDEOS_filter next to the clips"),
    "max_black": ("0.1", "share of black frames, 0 to 1; off: no limit, here and below"),
    "max_frozen": ("0.2", "longest run of equal frames, as a share of the clip, 0 to 1"),
    "min_sharpness": ("10", "variance of the Laplacian, at 480 pixels of the shorter side"),
    "min_motion": ("0.3", "mean difference of frames 0.1 s apart, in grey levels of 255"),
    "max_border": ("4", "width of black borders, in pixels"),
    "duplicate_distance": ("0.1", "clips are duplicates if their hashes differ in a smaller share of bits, 0 to 1"),
    "move": ("false", "true: moves flagged clips and their captions to the folder moved in out; or a folder"),
    "undo": ("false", "true: moves all moved clips back, and measures nothing"),
    "timeout_seconds": ("120", "seconds without a decoded frame until a clip is refused"),
}
EXPORT_OPTIONS = {
    "adapter": (None, "file, folder or hub:OWNER/NAME[/FILE][@REVISION] to convert, in any of the formats"),
    "to": (
        "",
        "official (attention only), diffusers, comfyui, kohya or native (as `train`); for a folder one or more, a,b",
    ),
    "out": (
        "",
        "new .safetensors file, or new folder for the adapter and a model card; required without push=; default with "
        "push=: hub/STEP in the run",
    ),
    "dtype": ("fp32", "fp32, bf16 or fp16"),
    "adapter_alpha": ("", "alpha of an adapter that does not state it; default: the rank"),
    "push": ("", "owner/name on the Hugging Face hub: uploads the folder"),
    "private": ("true", "whether a repository that push creates is private"),
    "dry_run": ("false", "true: makes the folder and uploads nothing"),
    "title": ("", "title of the adapter; default: as stated in the file, which is the run's name"),
    "author": ("", "name or address of the author; default: as stated in the file"),
    "license": ("", "license identifier of the hub, such as apache-2.0; default: as stated in the file"),
    "trigger": ("", "trigger words of the adapter; default: as stated in the file"),
    "endpoint": ("", "address of another hub"),
}
_REDUCED = {
    "rank": ("", "maximum rank of each layer, reduced by SVD"),
    "energy": ("", "or: reduces each layer to the lowest rank that keeps this share of its energy, such as 0.99"),
}
LORA_OPTIONS = {
    "inspect": {
        "out": ("", "new .html file: a page with a chart by block and layer"),
        "json": ("false", "true: prints JSON"),
    },
    "merge": {
        "strengths": ("", "one strength per file, such as [0.8,0.5]; default: 1"),
        "out": (None, "new .safetensors file"),
        **_REDUCED,
    },
    "resize": {"out": (None, "new .safetensors file"), **_REDUCED},
    "compare": {"json": ("false", "true: prints JSON")},
    "bake": {
        "model.weights": (None, "weights folder of the base, in any layout"),
        "out": (None, "new weights folder"),
        "strength": ("1", "strength of the adapter; 1 is as trained"),
        "to": ("official", "official or diffusers, the layout of the new DiT"),
        "dtype": ("bf16", "bf16, fp16 or fp32"),
    },
    "extract": {
        "base": (None, "weights folder of the base, in any layout"),
        "tuned": (None, "weights folder of the same model after training"),
        "rank": (None, "rank of each layer"),
        "out": (None, "new .safetensors file"),
        "targets": ("attention_mlp", "attention or attention_mlp: the layers of each block"),
    },
}
REPLAY_OPTIONS = {
    "bundle": (None, "folder that `train` wrote when it refused a step; `bundle=` may be left out"),
    "device": ("auto", "cpu, cuda or auto"),
}
PULL_OPTIONS = {
    "to": ("~/.cache/mochi_tune/mochi-1-preview", "folder; the same command resumes an interrupted download"),
    "source": ("official", "layout to download: official, diffusers or comfyui"),
    "precision": ("", "diffusers: bf16 or fp32; comfyui: bf16 or fp8; empty: bf16, or the official files as published"),
    "repo": ("", "hub repository with the same layout; empty: the default of the source"),
    "revision": ("", "branch, tag or commit; empty: that of the folder, else the tested commit"),
    "endpoint": ("", "address of another hub"),
    "dry_run": ("false", "true: lists the files and their sizes, downloads nothing"),
}
DESCRIBE_OPTIONS = {
    "videos": (None, "folder of clips; captions are written next to them as NAME.txt; nothing is ever replaced"),
    "endpoint": (None, "OpenAI-compatible address, up to /v1; local: a transformers model in a folder"),
    "model": (None, "model name at the endpoint; for endpoint=local its folder"),
    "key_file": (
        "",
        "file with the API key; default: the environment variable OPENAI_API_KEY, sent only to "
        "https://api.openai.com/v1 or OPENAI_BASE_URL",
    ),
    "trigger": (
        "",
        "word that each caption gets: first, or wherever the answer has it if the template asks for {trigger}",
    ),
    "template": ("", "file with another prompt; {num_frames}, {seconds}, {max_words}, {trigger} are replaced"),
    "language": ("en", "en: refuses answers that are not English; any: accepts all"),
    "num_frames": ("8", "frames sent per clip, evenly spaced"),
    "image_size": ("512", "maximum length of a frame's longer side, in pixels"),
    "stills": ("false", "true: describes still images too"),
    "workers": ("4", "clips described concurrently"),
    "requests_per_minute": ("0", "maximum requests per minute; 0: no limit"),
    "timeout_seconds": ("120", "timeout of a request, in seconds"),
    "clip_seconds": ("600", "timeout of all requests of a clip with their pauses, in seconds"),
    "retries": ("4", "retries per clip, whatever fails: the connection, the endpoint, the answer"),
    "backoff_seconds": ("1", "seconds before the first retry, doubled before each further one"),
    "max_tokens": ("1000", "maximum tokens of an answer; models that reason first need more"),
    "price_in": ("", "price of a million input tokens, to report the cost"),
    "price_out": ("", "price of a million output tokens"),
    "model.weights": ("~/.cache/mochi_tune/mochi-1-preview", "Mochi's weights, whose T5 tokenizer measures captions"),
    "device": ("auto", "device of endpoint=local: cpu, cuda or auto"),
    "dry_run": ("false", "true: prints the prompt and the number of clips, sends no request"),
    "frames_out": ("", "with dry_run=true: new folder for the frames of the first clip"),
}
VERIFY_OPTIONS = {
    "reference": (
        "",
        "folder of reference vectors of the official implementation, such as tests/golden; default: the packaged ones",
    ),
    "device": ("cpu", "cpu, cuda or auto"),
    "dtype": ("fp32", "fp32 or bf16"),
    "parallel.num_processes": ("1", "2 or more: checks the multi-process code too"),
}
DOCTOR_OPTIONS = {
    "device": ("auto", "device of the numerical self-test: cpu, cuda or auto"),
    "model.weights": ("~/.cache/mochi_tune/mochi-1-preview", "folder of Mochi's weights"),
}
BENCH_OPTIONS = {
    "what": (None, "sample (a step with guidance), decode, encode or train (a step)"),
    "model": ("mochi_1", "mochi_1, toy or tiny, with random weights"),
    "num_frames": ("37", "frames, 6k+1"),
    "height": ("480", "pixels"),
    "width": ("848", "pixels"),
    "memory": ("80gb", "80gb, 48gb, 24gb, 16gb or 12gb, see the setting"),
    "device": ("auto", "cpu, cuda or auto"),
    "dtype": ("bf16", "fp32 or bf16"),
    "depth": ("all", "blocks of the DiT, or of each level of the VAE; default: all, on a CPU 1"),
    "limit_gib": ("0", "GPU memory limit in GiB, to emulate a smaller card; 0: no limit"),
    "repeats": ("3", "timed steps or passes"),
    "lora_rank": ("0", "rank of an adapter on the attention; 0: no adapter, for what=train 16"),
    "compile": ("auto", "true, false, or auto: as sample and train do by default"),
    "recompute": ("auto", "for what=train, as train.recompute"),
    "precision": ("bf16", "for what=train, as model.precision: bf16, fp8, int8 or nf4"),
    "parallel.num_processes": ("1", "processes on this machine, one per GPU"),
    "out": ("", ".jsonl file to append the result to"),
}
DEMO_OPTIONS = {"out": ("demo", "folder; each demo writes a numbered subfolder with its page, report.html")}
EXPERIMENTS = (
    "objective", "layers", "precision", "frame_rate", "guidance", "rate", "rank", "clips", "steps", "caption_dropout",
    "sigma", "adapter_dtype",
)  # fmt: skip
EXPERIMENT_OPTIONS = {
    "what": (
        None,
        "objective, layers (adapted ones), precision (of the base), frame_rate (of videos), rate (learning rate), "
        "rank, clips (number), steps, caption_dropout, sigma (distribution), adapter_dtype or guidance (in which "
        "steps)",
    ),
    "seeds": ("3", "runs per variant"),
    "out": ("experiments", "folder; the same command resumes"),
}
UI_OPTIONS = {
    "folder": (".", "folder of conf, videos and runs; the page reads and writes nothing outside it"),
    "host": ("127.0.0.1", "address to listen on; any other than a loopback address needs a password"),
    "port": ("7860", "port; 0: any free one"),
    "password": (
        "",
        "password of the page; MOCHI_TUNE_UI_PASSWORD in the environment hides it from other users",
    ),
}
TOY_OPTIONS = {
    "clips": {"out": ("toy_videos", "folder of the clips"), "seed": ("1", "seed of positions, sizes and light")},
    "weights": {
        "work": ("toy_work", "folder of checkpoints; the same command resumes"),
        "out": ("toy_weights", "output folder, for model.weights"),
    },
}


def is_setting(argument: str) -> bool:
    """Whether an argument is key=value or an option, not a file: folders of sweeps have names such as lr=1e-4."""
    key, equals, _ = argument.partition("=")
    is_key = bool(equals) and re.fullmatch(r"[\w.-]*", key) is not None and not os.path.exists(argument)
    return is_key or argument.startswith("-")


def plain_options(
    verb: str, arguments: list[str], known: Mapping[str, tuple[str | None, str]], files: str = ""
) -> dict[str, str] | None:
    """Parses the key=value arguments of a verb without a configuration file; returns None after printing its help.

    Args:
        verb: name of the verb, for messages.
        arguments: the arguments after the verb.
        known: key -> default (None: required) and meaning.
        files: the arguments without a key, for the help, such as "FILE".
    """
    if "--help" in arguments or "-h" in arguments:
        print(" ".join(filter(None, ["mochi-tune", verb, files, "[key=value ...]"])) + "\n")
        for key, (default, meaning) in known.items():
            print(f"  {key + '=' + (default or ''):<44} {meaning}{' (required)' if default is None else ''}")
        return None
    options = {key: default for key, (default, _) in known.items()}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in known:
            hint = _hint(verb, argument, arguments, known, files)
            what = f"{key}=" if equals else repr(argument)
            *others, last = [f"{k}=" for k in known]
            listed = f"{', '.join(others)} and {last}" if others else last
            raise ConfigError(f"{what} is not a setting of {verb}, which takes {listed}{hint}")
        if not value and known[key][0]:
            raise ConfigError(f"{argument} is empty: give a value, or leave it out for {key}={known[key][0]}.")
        # Shells do not expand ~ in every word of the form KEY=~/DIR.
        options[key] = os.path.expanduser(value) if value == "~" or value.startswith("~/") else value
    if missing := [key for key, value in options.items() if value is None or (not value and known[key][0] is None)]:
        raise ConfigError(f"{verb} needs {', '.join(f'{key}=...' for key in missing)}: see `mochi-tune {verb} --help`.")
    return {key: value for key, value in options.items() if value is not None}


def _hint(
    verb: str, argument: str, arguments: list[str], known: Mapping[str, tuple[str | None, str]], files: str
) -> str:
    """Returns the end of the error for an argument that a verb does not take: what to write instead."""
    key, equals, value = argument.partition("=")
    if near := difflib.get_close_matches(key, known, n=1):
        return f"; did you mean {near[0]}=?"
    if files and (value.endswith(".safetensors") or value.startswith("hub:") or os.path.exists(value)):
        return f"; did you mean {shlex.join(['mochi-tune', *verb.split(), value])}? Files have no key."
    needed = [name for name, (default, _) in known.items() if default is None]
    is_word = not equals and not argument.startswith("-")
    if is_word and needed and not any(each.startswith(f"{needed[0]}=") for each in arguments):
        return f"; did you mean {shlex.quote(f'{needed[0]}={argument}')}?"
    return "."


def load(verb: str, arguments: list[str]) -> "RunConfig | None":
    """Loads the settings of a verb; returns None after printing them (--cfg) or the help (--help)."""
    from mochi_tune.config.load import SAMPLE_ALIASES, check_run_folder, config_yaml, load_config

    if "--help" in arguments or "-h" in arguments:
        print_help(verb, is_complete="all" in arguments)
        return None
    check_form(verb, arguments)
    flags = [argument for argument in arguments if argument == "--cfg"]
    settings = [argument for argument in arguments if argument not in flags]
    names = [setting.removeprefix("conf=") for setting in settings if setting.startswith("conf=")]
    if not names:
        raise ConfigError(f"{verb} needs conf=NAME: for example conf=my_lora.")
    if len(names) > 1:
        raise ConfigError(f"{verb} takes one conf=NAME, got {len(names)}: leave out all but one.")
    settings = [setting for setting in settings if not setting.startswith("conf=")]
    if verb == "sample":
        settings = [f"sample.{s}" if s.partition("=")[0] in SAMPLE_ALIASES else s for s in settings]
        if {"sample.prompt", "sample.prompts"} <= {setting.partition("=")[0] for setting in settings}:
            raise ConfigError("prompt= and prompts= are both given: leave one out.")
    config = load_config(names[0], settings)
    check_run_folder(names[0], settings, config)
    started = num_processes_here(os.environ)
    if verb in ("train", "sample") and started > 1 and config.parallel.num_processes == 1:
        # parallel=context means all processes, whoever started them.
        config = load_config(names[0], [*settings, f"parallel.num_processes={started}"])
    for key, value, default in (
        ("engine", config.parallel.engine, "processes"),
        ("shard", config.parallel.shard, None),
    ):
        if verb not in ("prepare", "sample") and value != default:
            raise ConfigError(
                f"parallel.{key}={value} is a setting of `prepare` and `sample`, and `{verb}` ignores it: leave it out."
            )
    if verb == "sample" and config.parallel.shard == "merge":
        raise ConfigError(
            "parallel.shard=merge is of `prepare`: each video of `sample` is a file of its own, and there is nothing "
            "to merge; leave it out."
        )
    if flags:
        print(config_yaml(config), end="")
        return None
    return config


def print_help(verb: str, is_complete: bool) -> None:
    """Prints the usage of a verb with a configuration file, and its most important settings or all."""
    from mochi_tune.config.docs import settings_help

    lines = USAGE.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"  mochi-tune {verb}"))
    more = [line for line in lines[first + 1 : first + 2] if not line.startswith("  mochi-tune")]
    print("\n".join([lines[first], *more]))
    if not is_complete:
        print(f"\n{short_help(verb)}", end="")
        return
    print("\nEvery setting: its default, allowed values and meaning. Set it by key=value or in conf/NAME.yaml.\n")
    print(settings_help(), end="")
