"""The help of the command line, and the settings of the verbs that have no configuration file."""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mochi_tune.cli.launch import num_processes_here
from mochi_tune.cli.short_help import check_form, short_help
from mochi_tune.errors import ConfigError

if TYPE_CHECKING:
    from mochi_tune.config.schema import RunConfig

USAGE = """\
mochi-tune: a folder of videos becomes a LoRA for Mochi 1 that renders everywhere.

  mochi-tune split   in=FOOTAGE out=DIR [detector=adaptive|content|threshold max_seconds=6 ...]
                     footage -> one clip a scene, cut to the frame, with a table and a contact sheet
  mochi-tune filter  videos=DIR [out=DIR] [max_black=0.1 ...] [move=true|DIR] | undo=true
                     black, frozen, blurred, still, framed and doubled clips -> a table and a page; moved when asked
  mochi-tune plan    conf=NAME [card=4090 | card=NAME card_gib=24] [key=value ...]
                     memory, time and disk of a run, foretold before anything is loaded
  mochi-tune doctor  [device=auto]                what this machine has and lacks, and what to do
  mochi-tune init    NAME                         writes conf/NAME.yaml, with comments, and videos/ with a README
  mochi-tune inspect conf=NAME [out=DIR] [key=value ...]      the clips as the model will see them -> a page
  mochi-tune describe videos=DIR endpoint=http://localhost:8000/v1 model=NAME [dry_run=true]
                     captions for clips that have none, by a model that sees pictures; endpoint=local model=DIR
  mochi-tune prepare conf=NAME [key=value ...]    videos and captions -> cache, once
  mochi-tune train   conf=NAME [key=value ...]    cache -> run folder with adapter.safetensors; the same command resumes
  mochi-tune replay  BUNDLE [device=auto]         makes a step again that `train` refused to make, sample by sample
  mochi-tune sample  conf=NAME prompt="..." [adapter=FILE adapter_strength=X seed=N out=FILE save_latents=true]
                     or prompts=FILE [seeds=0,1 grid=true compare=base parallel.num_processes=N memory=24gb]
  mochi-tune export  adapter=FILE to=official|diffusers|comfyui|kohya out=FILE [dtype=bf16]
                     or push=OWNER/NAME, to the Hugging Face hub with a model card; dry_run=true makes the folder only
  mochi-tune lora    inspect FILE [out=FILE.html] | compare FILE FILE | merge FILE FILE [strengths=[0.8,0.5]] out=FILE
                     | resize FILE rank=R|energy=0.99 out=FILE | bake FILE model.weights=DIR out=DIR
                     | extract base=DIR tuned=DIR rank=R out=FILE
  mochi-tune ui      [folder=.] [port=7860] [host=127.0.0.1 password=...]      the whole road as a page in the browser
  mochi-tune weights pull [source=official|diffusers|comfyui to=DIR]        fetch the weights, checked by sha256
                     | check [model.weights=DIR|FILE]         what is there, and what each verb lacks
  mochi-tune verify  [reference=DIR] [device=cpu] [dtype=fp32|bf16] [parallel.num_processes=N]
  mochi-tune bench   what=sample|decode|encode [model=mochi_1] [num_frames=37]     speed and memory, on random weights
  mochi-tune demo    [out=DIR]                    teaches the embedded toy model a new thing, measures it, makes a page
  mochi-tune experiment what=objective|layers|… [seeds=N] [out=DIR]       compares ways of training on the toy model
  mochi-tune toy     clips [out=DIR] | weights [work=DIR] [out=DIR]      draws the demo's clips | trains the toy model
  mochi-tune completion bash|zsh|fish             a script that completes verbs, settings and values in a shell

conf=NAME is conf/NAME.yaml here, else the packaged one, else a path. VERB --help lists the first settings of a verb,
--help all every one, and
`inspect`, `prepare`, `train` and `sample` take --cfg to print the settings that would run, without running.
"""

SPLIT_OPTIONS = {
    "in": (None, "film, or folder of films and folders"),
    "out": (None, "folder of the clips; the table and the contact sheet go to OUT_split beside it"),
    "detector": ("adaptive", "adaptive, content or threshold (fades to black), of PySceneDetect"),
    "threshold": ("", "of the detector; empty: its own, which is 3, 27 or 12"),
    "margin_seconds": ("0.1", "left out on each side of a cut"),
    "min_seconds": ("1.25", "shorter scenes give no clip"),
    "max_seconds": ("6", "longer scenes are divided"),
    "crf": ("12", "quality of the clips by x264, 0 (lossless) to 51"),
    "timeout_seconds": ("300", "a film of which nothing is decoded for so long is refused"),
}
FILTER_OPTIONS = {
    "videos": (None, "folder of clips"),
    "out": ("", "folder of the table and the page; default: VIDEOS_filter beside the clips"),
    "max_black": ("0.1", "share of black pictures, 0 to 1; off: no limit, as for all of these"),
    "max_frozen": ("0.2", "longest run of equal pictures, as a share of the clip, 0 to 1"),
    "min_sharpness": ("10", "variance of the Laplacian, at 480 pixels of the shorter side"),
    "min_motion": ("0.3", "mean difference of pictures 0.1 s apart, in grey levels of 255"),
    "max_border": ("4", "pixels of a black bar"),
    "duplicate_distance": (
        "0.1",
        "clips whose hashes differ in a smaller share of bits show the same, 0 to 1",
    ),
    "move": ("false", "true: flagged clips and their captions go to the folder moved in out; or a folder"),
    "undo": ("false", "true: moves back all that was moved, and measures nothing"),
    "timeout_seconds": ("120", "a clip of which nothing is decoded for so long is refused"),
}
EXPORT_OPTIONS = {
    "adapter": (None, "file, folder or hub:OWNER/NAME[/FILE][@REVISION] to convert, in any of the formats"),
    "to": (
        "",
        "official (attention only), diffusers, comfyui, kohya, native (as `train`); a folder: one or more, a,b",
    ),
    "out": (
        "",
        "new .safetensors file, or new folder for the adapter and a model card; default with push=: hub/STEP of the "
        "run; needed otherwise",
    ),
    "dtype": ("fp32", "fp32, bf16 or fp16"),
    "adapter_alpha": ("", "alpha of an adapter that does not state its own; else it is taken to be the rank"),
    "push": ("", "owner/name on the Hugging Face hub: uploads the folder"),
    "private": ("true", "whether a repository that push makes is private"),
    "dry_run": ("false", "true: makes the folder and uploads nothing"),
    "title": ("", "of the adapter; default: what it states, which is the run's name"),
    "author": ("", "a name or an address; default: what the adapter states"),
    "license": ("", "identifier of the hub, such as apache-2.0; default: what the adapter states"),
    "trigger": ("", "words that a prompt needs for the adapter; default: what it states"),
    "endpoint": ("", "address of another hub"),
}
_REDUCED = {
    "rank": ("", "reduces each layer to this rank at most, by SVD"),
    "energy": ("", "or: reduces each layer as far as it keeps this share of its energy, such as 0.99"),
}
LORA_OPTIONS = {
    "inspect": {
        "out": ("", "new .html file: a page with a chart by block and layer"),
        "json": ("false", "true: prints JSON"),
    },
    "merge": {
        "strengths": ("", "[0.8,0.5]: one for each file; 1 if not given"),
        "out": (None, "new .safetensors file"),
        **_REDUCED,
    },
    "resize": {"out": (None, "new .safetensors file"), **_REDUCED},
    "compare": {"json": ("false", "true: prints JSON")},
    "bake": {
        "model.weights": (None, "weights folder of the base, in any layout"),
        "out": (None, "new weights folder"),
        "strength": ("1", "1 is as trained"),
        "to": ("official", "official or diffusers, the layout of the new DiT"),
        "dtype": ("bf16", "bf16, fp16 or fp32"),
    },
    "extract": {
        "base": (None, "weights folder of the base, in any layout"),
        "tuned": (None, "weights folder of the same model after a training"),
        "rank": (None, "of each layer"),
        "out": (None, "new .safetensors file"),
        "targets": ("attention_mlp", "attention or attention_mlp: the layers of each block"),
    },
}
REPLAY_OPTIONS = {
    "bundle": (None, "folder that `train` wrote when it refused a step; `bundle=` may be left out"),
    "device": ("auto", "cpu, cuda or auto"),
}
PULL_OPTIONS = {
    "to": ("~/.cache/mochi_tune/mochi-1-preview", "folder; the same command goes on where it was cut off"),
    "source": ("official", "official, diffusers or comfyui: whose files"),
    "precision": ("", "diffusers: bf16 or fp32; comfyui: bf16 or fp8; empty: bf16, or the official files as published"),
    "repo": ("", "of the hub, laid out as the source's own; empty: that one"),
    "revision": ("", "branch, tag or commit; empty: the folder's own, else the commit that is known to fit"),
    "endpoint": ("", "address of another hub"),
    "dry_run": ("false", "true: list the files and their sizes, fetch nothing"),
}
DESCRIBE_OPTIONS = {
    "videos": (None, "folder of clips; captions go beside them, NAME.txt; nothing is ever replaced"),
    "endpoint": (None, "OpenAI-compatible address, up to /v1; local: a model of transformers in a folder"),
    "model": (None, "name at the endpoint; for endpoint=local the folder"),
    "key_file": (
        "",
        "file with the API key; default: OPENAI_API_KEY of the environment, sent to https://api.openai.com/v1 or "
        "OPENAI_BASE_URL alone",
    ),
    "trigger": (
        "",
        "word that each caption gets: put first, or where the answer has it if the template asks for {trigger}",
    ),
    "template": ("", "file with another prompt; {num_frames}, {seconds}, {max_words}, {trigger} are replaced"),
    "language": ("en", "en: answers that are not English are refused; any: all are taken"),
    "num_frames": ("8", "pictures of a clip, evenly spaced"),
    "image_size": ("512", "most pixels of a picture's longer side"),
    "stills": ("false", "true: still pictures are described too"),
    "workers": ("4", "clips in work at a time"),
    "requests_per_minute": ("0", "most requests a minute; 0: any number"),
    "timeout_seconds": ("120", "that a request may take"),
    "clip_seconds": ("600", "that all requests of a clip and the pauses between them may take"),
    "retries": ("4", "after a clip's first request, whatever fails: the connection, the endpoint, the answer"),
    "backoff_seconds": ("1", "pause before the first retry, twice as long before each further one"),
    "max_tokens": ("1000", "of an answer; more for models that think first"),
    "price_in": ("", "of a million tokens of prompts and pictures, to be told what it costs"),
    "price_out": ("", "of a million tokens of answers"),
    "model.weights": ("~/.cache/mochi_tune/mochi-1-preview", "Mochi's weights, whose T5 tokenizer measures captions"),
    "device": ("auto", "of endpoint=local: cpu, cuda or auto"),
    "dry_run": ("false", "true: prints the prompt and the number of clips, and asks nobody"),
    "frames_out": ("", "with dry_run=true: new folder for the pictures of the first clip"),
}
VERIFY_OPTIONS = {
    "reference": (
        "",
        "folder of vectors of the official implementation, such as tests/golden; default: those in the package",
    ),
    "device": ("cpu", "cpu, cuda or auto"),
    "dtype": ("fp32", "fp32 or bf16"),
    "parallel.num_processes": ("1", "2 or more: the paths of several processes too"),
}
DOCTOR_OPTIONS = {
    "device": ("auto", "of the self-test of numbers: cpu, cuda or auto"),
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
    "depth": ("all", "blocks of the DiT, or of each level of the VAE; on a CPU 1 if not given"),
    "limit_gib": ("0", "GiB of the GPU that may be used, as on a smaller card; 0: all"),
    "repeats": ("3", "steps or passes that are timed"),
    "lora_rank": ("0", "rank of an adapter on the attention; 0: none, in train 16"),
    "compile": ("auto", "true, false, or auto: as sample and train do by default"),
    "recompute": ("auto", "of train, as train.recompute"),
    "precision": ("bf16", "of train, as model.precision: bf16, fp8, int8 or nf4"),
    "parallel.num_processes": ("1", "processes on this machine, one a GPU"),
    "out": ("", ".jsonl file that gets a line more, besides what is printed"),
}
DEMO_OPTIONS = {"out": ("demo", "folder; each demo has a numbered one of its own in it, with its page, report.html")}
EXPERIMENTS = (
    "objective", "layers", "precision", "frame_rate", "guidance", "rate", "rank", "clips", "steps", "caption_dropout",
    "sigma", "adapter_dtype",
)  # fmt: skip
EXPERIMENT_OPTIONS = {
    "what": (
        None,
        "objective (of the training), layers (that are adapted), precision (of the base), frame_rate (of films), rate "
        "(of learning), rank, clips (how many), steps, caption_dropout, sigma (distribution), adapter_dtype or "
        "guidance (of which steps)",
    ),
    "seeds": ("3", "runs of each"),
    "out": ("experiments", "folder; the same command goes on where it was stopped"),
}
UI_OPTIONS = {
    "folder": (".", "the folder of conf, videos and runs; the page reads and writes nothing outside of it"),
    "host": ("127.0.0.1", "address to listen on; another than this machine's own needs a password"),
    "port": ("7860", "0: any that is free"),
    "password": ("", "asked of everybody; or the variable MOCHI_TUNE_UI_PASSWORD, which other users cannot see"),
}
TOY_OPTIONS = {
    "clips": {"out": ("toy_videos", "folder of the clips"), "seed": ("1", "of place, size and light")},
    "weights": {
        "work": ("toy_work", "folder of checkpoints; the same command goes on where it was stopped"),
        "out": ("toy_weights", "folder for model.weights"),
    },
}


def is_setting(argument: str) -> bool:
    """Whether an argument is key=value or an option, and no file: folders of sweeps have names such as lr=1e-4."""
    key, equals, _ = argument.partition("=")
    is_key = bool(equals) and re.fullmatch(r"[\w.-]*", key) is not None and not Path(argument).exists()
    return is_key or argument.startswith("-")


def plain_options(
    verb: str, arguments: list[str], known: Mapping[str, tuple[str | None, str]]
) -> dict[str, str] | None:
    """Reads the key=value arguments of a verb that has no configuration file; None where help was asked for.

    Args:
        verb: for the texts.
        arguments: of the command line, behind the verb.
        known: key -> default (None: it must be given) and what it means.
    """
    if "--help" in arguments or "-h" in arguments:
        print(f"mochi-tune {verb} [key=value ...]\n")
        for key, (default, meaning) in known.items():
            print(f"  {key + '=' + (default or ''):<44} {meaning}{' (needed)' if default is None else ''}")
        return None
    options = {key: default for key, (default, _) in known.items()}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}=?" if near else "."
            raise ConfigError(
                f"{argument!r} is not a setting of {verb}, which are {', '.join(f'{k}=' for k in known)}{hint}"
            )
        if not value and known[key][0]:
            raise ConfigError(f"{argument} is empty: give a value, or leave it out for {key}={known[key][0]}.")
        # A shell leaves it in words that are not KEY=~/DIR by its own rules.
        options[key] = os.path.expanduser(value) if value == "~" or value.startswith("~/") else value
    if missing := [key for key, value in options.items() if value is None or (not value and known[key][0] is None)]:
        raise ConfigError(f"{verb} needs {', '.join(f'{key}=...' for key in missing)}: see `mochi-tune {verb} --help`.")
    return {key: value for key, value in options.items() if value is not None}


def load(verb: str, arguments: list[str]) -> "RunConfig | None":
    """Loads the settings of a verb; prints them, or the verb's help, and returns None where that is asked for."""
    from mochi_tune.config.load import SAMPLE_ALIASES, check_run_folder, config_yaml, load_config

    if "--help" in arguments or "-h" in arguments:
        print_help(verb, is_complete="all" in arguments)
        return None
    check_form(verb, arguments)
    flags = [argument for argument in arguments if argument == "--cfg"]
    settings = [argument for argument in arguments if argument not in flags]
    names = [setting.removeprefix("conf=") for setting in settings if setting.startswith("conf=")]
    if len(names) != 1:
        raise ConfigError(f"{verb} takes one conf=NAME, got {len(names)}: for example conf=my_lora.")
    settings = [setting for setting in settings if not setting.startswith("conf=")]
    if verb == "sample":
        settings = [f"sample.{s}" if s.partition("=")[0] in SAMPLE_ALIASES else s for s in settings]
        if {"sample.prompt", "sample.prompts"} <= {setting.partition("=")[0] for setting in settings}:
            raise ConfigError("prompt= and prompts= are both given: leave one out.")
    config = load_config(names[0], settings)
    check_run_folder(names[0], settings, config)
    started = num_processes_here(os.environ)
    if verb in ("train", "sample") and started > 1 and config.parallel.num_processes == 1:
        # As with processes that are started here: parallel=context means all of them.
        config = load_config(names[0], [*settings, f"parallel.num_processes={started}"])
    for key, value, default in (
        ("engine", config.parallel.engine, "processes"),
        ("shard", config.parallel.shard, None),
    ):
        if verb not in ("prepare", "sample") and value != default:
            raise ConfigError(
                f"parallel.{key}={value} is of `prepare` and `sample`, and `{verb}` does nothing with it: leave it out."
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
    """Prints the usage of a verb that has a configuration file, and its first settings or all."""
    from mochi_tune.config.docs import settings_help

    lines = USAGE.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"  mochi-tune {verb}"))
    more = [line for line in lines[first + 1 : first + 2] if not line.startswith("  mochi-tune")]
    print("\n".join([lines[first], *more]))
    if not is_complete:
        print(f"\n{short_help(verb)}", end="")
        return
    print("\nEvery setting: its default, what it takes, what it means. Give it as key=value or in conf/NAME.yaml.\n")
    print(settings_help(), end="")
