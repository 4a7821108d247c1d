"""The form of a LoRA's settings, which is checked as on the command line and saved as conf/NAME.yaml."""

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mochi_tune.config.explain import as_yaml
from mochi_tune.config.load import PROMPTS, check_override, load_config, packaged_folder, quote
from mochi_tune.config.references import escape_references
from mochi_tune.config.schema import DataConfig, RunConfig
from mochi_tune.config.settings import GROUPS, known_keys, value_of
from mochi_tune.errors import ConfigError, MochiTuneError
from mochi_tune.files import write_atomic
from mochi_tune.ui.folder import changed_at, inside
from mochi_tune.ui.jobs import open_jobs

# Defaults list of a conf that the page writes. The page does not rewrite confs with other files in their list.
PLAIN_DEFAULTS = ("base", "_self_")
# Settings and groups with a separate field. All others are lines of text.
MAIN_KEYS = (
    "model", "data.videos", "data.num_frames", "data.height", "data.width", "data.caption_prefix",
    "lora", "lora.rank", "memory", "train.steps", "train.learning_rate", "train.batch_size", "train.caption_dropout",
    "train.checkpoint_every", "train.validate_every", "train.sample_every", "train.sample_prompts",
)  # fmt: skip
# Settings whose values may end in a space, such as a prefix. Elsewhere the page removes trailing spaces.
WORDS = ("data.caption_prefix", "data.caption_suffix", *PROMPTS)
# Settings that name a file or folder. The weights of the model may lie anywhere: they are shared, and only read.
PATHS = (
    "run_dir", "resume_from", "data.videos", "data.cache", "data.preview", "lora.init_from", "sample.prompts",
    "sample.adapter", "sample.init_video", "sample.latents", "sample.out", "sample.prompt_cache",
)  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class Form:
    """Settings as the user has filled them in.

    Attributes:
        name: name of the file, and of the LoRA unless `more` sets another one.
        main: key of MAIN_KEYS -> text; "" stands for the default.
        more: other settings, one `key=value` per line.
        prompts: train.sample_prompts of a form that was read from a file.
    """

    name: str
    main: Mapping[str, str] = field(default_factory=dict)
    more: str = ""
    prompts: tuple[str, ...] = ()

    def overrides(self) -> list[str]:
        """Returns the settings as arguments of the command line.

        Raises:
            ConfigError: the name is not possible, a line is not a setting, or a setting is given twice.
        """
        _check_name(self.name)
        given = {key: value for key, value in self.main.items() if value}
        lines = [line.lstrip() for line in self.more.splitlines()]
        for line in [line for line in lines if line and not line.startswith("#")]:
            key = line.partition("=")[0]
            line = line if key in WORDS else line.rstrip()
            check_override(line)
            value = line.partition("=")[2]
            if key in given:
                raise ConfigError(f"{key} is given twice: remove it from the other settings.")
            given[key] = value
        # A file may set another name than its own among the other settings.
        return [f"{key}={value}" for key, value in ({"name": self.name} | given).items()]


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"name={name} is not possible: use letters, digits, - _ and ., at most 64.")
    if name == "base" or name.endswith((".yaml", ".yml")):
        raise ConfigError(
            f"name={name} is not possible: every conf is built on base, and its file is NAME.yaml: choose another name."
        )


def check_form(folder: Path, form: Form) -> RunConfig:
    """Returns the settings of a form, checked as on the command line.

    Raises:
        MochiTuneError: a setting is unknown or does not fit, or a path in it leads out of the page's folder.
    """
    config = load_config("base", form.overrides())
    check_paths(folder, config, PATHS)
    for source in config.data.sources:
        inside(folder, source.folder)
    return config


def check_paths(folder: Path, config: RunConfig, keys: Iterable[str]) -> None:
    """Checks that settings name files and folders in the page's folder. The defaults of settings may be elsewhere.

    Args:
        folder: folder of the page.
        config: the settings.
        keys: keys of PATHS to check.

    Raises:
        DataError: a path leads out of the folder.
    """
    for key in keys:
        value = value_of(config, key)
        # A name on the hub, such as hub:OWNER/NAME, reads like a path in the folder.
        for path in value if isinstance(value, list) else [value]:
            if path is not None and path != known_keys()[key].default:
                inside(folder, path)


def sources_note(data: DataConfig) -> str:
    """Returns the message for settings with data.sources, which replace the folder of videos."""
    names = ", ".join(source.folder for source in data.sources)
    return (
        f"this conf takes its clips from {names}; {data.videos} is not used: change the files of those folders by "
        "hand, or take data.sources out of the other settings."
    )


def videos_of(folder: Path, form: Form) -> str:
    """Returns the folder of videos that a form names.

    Raises:
        MochiTuneError: the form has data.sources instead, or a mistake that leaves the folder open.
    """
    try:
        data = check_form(folder, form).data
    except MochiTuneError:
        videos = form.main.get("data.videos") or "videos"
        if "data.sources" in form.more or "${" in videos:
            raise
        # The form reports the mistake. Clips can be added all the same.
        return videos
    if data.sources:
        raise ConfigError(sources_note(data))
    return data.videos


def conf_path(folder: Path, name: str) -> Path:
    """Returns the path of conf/NAME.yaml.

    Raises:
        DataError: it is outside of the folder.
    """
    return inside(folder, Path("conf") / f"{name}.yaml")


def list_confs(folder: Path) -> list[str]:
    """Returns the names of a folder's confs, in alphabetical order."""
    found = []
    for path in (folder / "conf").glob("*.yaml"):
        # Names that the form refuses, and links that lead out of the folder.
        with contextlib.suppress(MochiTuneError):
            _check_name(path.stem)
            found += [path.stem] if conf_path(folder, path.stem).is_file() else []
    return sorted(found)


def newest_conf(folder: Path) -> str:
    """Returns the name of the conf that was changed last, or a name for the first one."""
    names = list_confs(folder)
    return max(names, key=lambda name: changed_at(folder / "conf" / f"{name}.yaml"), default="my_lora")


def conf_of_run(folder: Path, run_dir: str, but: str = "") -> str:
    """Returns the name of the conf that has a run folder, "" for none. Confs with mistakes are ignored.

    Args:
        folder: folder of the page.
        run_dir: path of the run folder in it.
        but: name of a conf to ignore.
    """
    for name in [name for name in list_confs(folder) if name != but]:
        try:
            config = load_config(str(conf_path(folder, name)), [])
            if inside(folder, config.run_dir) == inside(folder, run_dir):
                return name
        except MochiTuneError:
            continue
    return ""


def conf_text(folder: Path, form: Form) -> str:
    """Returns the YAML of a form, which contains the filled-in settings and no defaults.

    Raises:
        MochiTuneError: as `check_form`.
    """
    from omegaconf import OmegaConf

    config = check_form(folder, form)
    keys = [override.partition("=") for override in form.overrides()]
    groups = [f"override {key}: {value}" for key, _, value in keys if key in GROUPS]
    tree: dict[str, Any] = {}
    for key, _, text in keys:
        if key not in GROUPS:
            section, _, name = key.rpartition(".")
            (tree.setdefault(section, {}) if section else tree)[name] = _as_written(config, key, text)
    defaults = ["base", *groups, "_self_"]
    head = "# Written by the page of `mochi-tune ui`; every verb takes it as conf=" + form.name + ".\n"
    lines = "".join(f"  - {entry}\n" for entry in defaults)
    return f"{head}defaults:\n{lines}{OmegaConf.to_yaml(OmegaConf.create(tree))}"


def _as_written(config: RunConfig, key: str, text: str) -> Any:
    """Returns a setting as a conf has it: its value, or its text if that refers to others, such as ${name}."""
    value = value_of(config, key)
    if not _refers(key, text):
        plain = [each.model_dump(exclude_defaults=True) for each in value] if key == "data.sources" else value
        return escape_references(plain)
    if isinstance(value, list) and text.startswith("["):
        from hydra.core.override_parser.overrides_parser import OverridesParser

        return OverridesParser.create().parse_override(f"{key}={text}").value()
    if isinstance(value, dict):
        import yaml

        return yaml.safe_load(text)
    return text


def _refers(key: str, written: Any) -> bool:
    """Whether the text of a setting refers to other settings; prompts are taken literally."""
    return key not in PROMPTS and "${" in str(written)


def save_conf(folder: Path, form: Form, replaces: bool) -> Path:
    """Writes conf/NAME.yaml atomically, unless it has these settings already.

    Args:
        folder: folder of the page.
        form: settings to write.
        replaces: whether a file with other settings may be replaced.

    Raises:
        MochiTuneError: as `check_form`; or the file has other settings and `replaces` is False, cannot be read, or a
            job is waiting to run it.
    """
    path, text = conf_path(folder, form.name), conf_text(folder, form)
    if mistake := conf_mistake(folder, form.name):
        raise ConfigError(mistake)
    waiting = [job for job in open_jobs(folder, "waiting") if f"conf={form.name}" in job.arguments]
    if waiting and path.exists() and not _has_same_settings(path, folder, form):
        raise ConfigError(
            f"job {waiting[0].number} is waiting to run conf/{form.name}.yaml: save after that job has started, stop "
            "that job, or choose another name."
        )
    if path.exists() and not replaces and not _has_same_settings(path, folder, form):
        raise ConfigError(f"conf/{form.name}.yaml has other settings: tick `replace it`, or choose another name.")
    if path.exists() and _has_same_settings(path, folder, form):
        return path
    if path.exists() and (others := _other_defaults(path)):
        raise ConfigError(
            f"conf/{form.name}.yaml is based on {', '.join(others)}, which the page would remove: choose another name."
        )
    run_dir = check_form(folder, form).run_dir
    if run_dir != _run_dir_of(path) and (other := conf_of_run(folder, run_dir, but=form.name)):
        raise ConfigError(
            f"run_dir={run_dir} is the folder of conf/{other}.yaml, whose run would continue: choose another name, or "
            "set another run_dir in the other settings."
        )
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, text.encode(), durable=True)
    return path


def _run_dir_of(path: Path) -> str:
    """Returns the run folder of a conf; "" if there is no such file or it has a mistake."""
    try:
        return load_config(str(path), []).run_dir
    except MochiTuneError:
        return ""


def _has_same_settings(path: Path, folder: Path, form: Form) -> bool:
    return load_config(str(path), []) == check_form(folder, form)


def conf_mistake(folder: Path, name: str) -> str:
    """Returns why conf/NAME.yaml cannot be read, in one line; "" if it can, or if there is no such file."""
    try:
        if conf_path(folder, name).is_file():
            read_form(folder, name)
    except MochiTuneError as error:
        return f"{error} The page does not replace this file: correct it, or choose another name."
    return ""


def read_form(folder: Path, name: str) -> Form:
    """Reads the form of a conf, with the settings of other confs that it is based on.

    Raises:
        MochiTuneError: the file does not exist or has a mistake.
    """
    import yaml

    path = conf_path(folder, name)
    if not path.is_file():
        raise ConfigError(f"conf/{name}.yaml does not exist any more: choose another one.")
    config = load_config(str(path), [])
    written = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    given = _flat({key: value for key, value in written.items() if key != "defaults"})
    groups = {key: value for key, value in _all_groups(path).items() if key in GROUPS}
    if _other_defaults(path):
        base = load_config(str(packaged_folder() / "base.yaml"), [f"{key}={value}" for key, value in groups.items()])
        given = {key: given.get(key) for key in known_keys() if value_of(config, key) != value_of(base, key)}
    main = {key: groups[key] for key in MAIN_KEYS if key in groups}
    main |= {key: _as_field(config, key, given[key]) for key in MAIN_KEYS if key in given}
    rest = [key for key in given if key not in MAIN_KEYS and key != "name"]
    more = [f"{key}={groups[key]}" for key in groups if key not in MAIN_KEYS]
    more += [f"{key}={_as_field(config, key, given[key])}" for key in rest]
    if config.name != name:
        more.insert(0, f"name={_as_field(config, 'name', given.get('name', ''))}")
    return Form(name, main, "\n".join(more), tuple(config.train.sample_prompts))


def _as_field(config: RunConfig, key: str, written: Any) -> str:
    """Returns the text of a setting for its field, with references such as ${name} unresolved."""
    return as_text(written if _refers(key, written) else value_of(config, key))


def as_text(value: Any) -> str:
    """Formats a value so that `key=value` reads it back."""
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return _in_list(value) if isinstance(value, list) else as_yaml(value)


def _in_list(value: Any) -> str:
    """Formats a list, or an element of one, in Hydra's grammar."""
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_defaults=True)
    if isinstance(value, list):
        return f"[{', '.join(map(_in_list, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_in_list(each)}' for key, each in value.items())}}}"
    return quote(value) if isinstance(value, str) else as_yaml(value)


def _flat(written: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in written.items():
        if key in known_keys():
            found[key] = value
        elif isinstance(value, dict):
            found |= {f"{key}.{name}": each for name, each in value.items()}
    return found


def _all_groups(path: Path) -> dict[str, str]:
    """Returns the files that a conf chooses, or a conf that it is based on: group -> name."""
    found = {}
    for name in _other_defaults(path):
        files = [folder / f"{name}.yaml" for folder in (path.parent, Path("conf"), packaged_folder())]
        found |= _all_groups(next(file for file in files if file.is_file()))
    return found | _groups(_defaults_of(path))


def _groups(defaults: list[Any]) -> dict[str, str]:
    """Returns the files that the defaults list of a conf chooses: group -> name."""
    pairs = [pair for entry in defaults if isinstance(entry, dict) for pair in entry.items()]
    return {str(key).removeprefix("override ").strip(): str(value) for key, value in pairs}


def _other_defaults(path: Path) -> list[str]:
    return [entry for entry in _defaults_of(path) if isinstance(entry, str) and entry not in PLAIN_DEFAULTS]


def _defaults_of(path: Path) -> list[Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return []
    return content.get("defaults") or [] if isinstance(content, dict) else []
