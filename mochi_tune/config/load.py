"""Loads the settings of a run: Hydra composes the files, the schema validates the result."""

import contextlib
import difflib
import functools
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mochi_tune.config.checks import check_config
from mochi_tune.config.explain import as_yaml, does_not_fit, explain, explain_missing, explain_section, nearest
from mochi_tune.config.references import check_number_of_references, check_references, escape_references, texts_in
from mochi_tune.config.sample import SampleConfig
from mochi_tune.config.schema import RunConfig
from mochi_tune.config.settings import GROUPS, known_keys, rename_old, sections
from mochi_tune.config.yaml_files import (
    check_yaml,
    describe_yaml_error,
    included_files,
    included_names,
    read_plain_yaml,
)
from mochi_tune.errors import ConfigError
from mochi_tune.weights.paths import WeightsPaths

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Keys of section `sample` that its command line takes without the section.
SAMPLE_ALIASES = tuple(SampleConfig.model_fields)
# Settings of the sampler that a preset sets.
PRESET_KEYS = ("steps", "guidance", "threshold", "linear_steps", "sigmas")
# Files next to the config.yaml of a run.
RECORDS = ("checkpoints/step_*", "metrics.jsonl", "history.jsonl")
# Settings of one start, with their defaults: the config.yaml of a run must not repeat them at each later start.
ONE_START = {"resume": "auto", "resume_from": None}
PROMPTS = ("sample.prompt", "sample.negative_prompt", "train.sample_prompts")
# Hydra has global state, and two threads that import it at once see it half initialised.
_ONE_AT_A_TIME = threading.Lock()
# A list that needs no quotes in a shell: 0,1.
_NUMBERS = re.compile(r"[-+.\de]+(\s*,\s*[-+.\de]+)*")


def packaged_folder() -> Path:
    """Returns the folder of the packaged configuration files."""
    from mochi_tune import conf

    return Path(conf.__path__[0])


def load_config(name: str, overrides: list[str]) -> RunConfig:
    """Composes conf/NAME.yaml, or the packaged one, or a path, with `key=value` overrides into checked settings.

    The config.yaml of a run sets no `resume` or `resume_from`, though earlier versions wrote them there.

    Raises:
        ConfigError: the file does not exist, a key is unknown, or a value does not fit.
    """
    path = find_config(name)
    for override in overrides:
        check_override(override)
    given = {key: value for key, _, value in (override.partition("=") for override in overrides)}
    contents = _check_all(path, [f"{key}/{value}" for key, value in given.items() if key in GROUPS])
    content = contents[0]
    if not isinstance(content, dict | None):
        what = "a list" if isinstance(content, list) else "a single value"
        raise ConfigError(f"{path} contains {what} instead of settings: write lines of `key: value`.")
    # A file without `defaults` lists the differences from base.
    implies_base = "defaults" not in (content or {}) and path.stem != "base"
    for section in (content or {}).keys() & sections().keys() if implies_base else ():
        if not isinstance((content or {})[section], dict):
            raise ConfigError(f"{path}: {explain_section(str(section))}")
    reset = _reset_by_preset([key.removeprefix("sample.") for key in given if key.startswith("sample.")])
    with _ONE_AT_A_TIME:
        values = {key: _read_value(key, value) for key, value in given.items() if key not in GROUPS}
        check_number_of_references([*contents, values])
        own = (ONE_START if _is_of_a_run(path) else {}) | {f"sample.{key}": None for key in reset}
        settings = _compose(path, implies_base, given, own | values)
    try:
        config = RunConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(explain(error, str(path), given)) from None
    check_config(config)
    return config


def check_run_folder(name: str, given: Collection[str], config: RunConfig) -> None:
    """Refuses a run's config.yaml that names a different folder than its own, as after a move.

    Args:
        name: name of the conf, as in `load_config`.
        given: the `key=value` overrides.
        config: the loaded settings.

    Raises:
        ConfigError: the folders differ, and no override sets run_dir.
    """
    path, run_dir = find_config(name), Path(config.run_dir)
    folder = path.parent
    if not _is_of_a_run(path) or any(override.startswith("run_dir=") for override in given):
        return
    if not run_dir.exists() or not run_dir.samefile(folder):
        raise ConfigError(
            f"{path} belongs to a run in {folder} and has run_dir={config.run_dir}, another folder: set "
            f"run_dir={folder}, or the folder that you mean."
        )


def _is_of_a_run(path: Path) -> bool:
    """Whether a file is the config.yaml that a run wrote."""
    return path.name == "config.yaml" and any(any(path.parent.glob(each)) for each in RECORDS)


def change_sample(sample: SampleConfig, values: dict[str, Any]) -> SampleConfig:
    """Returns the settings of the sampler with some values changed.

    Raises:
        ConfigError: a value does not fit.
    """
    try:
        return SampleConfig.model_validate(sample.model_dump() | _reset_by_preset(values) | values)
    except ValidationError as error:
        given = {f"sample.{key}": as_yaml(value) for key, value in values.items()}
        raise ConfigError(explain(error, "sample", given, "sample")) from None


def _reset_by_preset(given: Collection[str]) -> dict[str, None]:
    """Returns, as None, the settings that a given preset determines: those of the schedule that are not given."""
    return {key: None for key in PRESET_KEYS if key not in given} if "preset" in given else {}


@contextlib.contextmanager
def _file_on_base(path: Path, implies_base: bool) -> Iterator[Path]:
    """Yields the file for Hydra to compose: this one, or a temporary one with its content on top of base."""
    # Hydra first searches the folder of the file, where a packaged file has the packaged groups.
    if not implies_base and path.suffix == ".yaml" and not (_is_packaged(path) and _has_own_groups()):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        # Hydra only reads files with this suffix.
        own, whole = Path(folder) / "own.yaml", Path(folder) / "whole.yaml"
        shutil.copyfile(path, own)
        whole.write_text("defaults: [base, own, _self_]\n")
        yield whole if implies_base else own


def _compose(path: Path, implies_base: bool, given: Mapping[str, str], values: Mapping[str, Any]) -> Any:
    """Returns the defaults, overridden by the file and then by the values of `given`, as a tree of plain values."""
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
    from yaml import MarkedYAMLError, YAMLError

    groups = tuple(f"{key}={value}" for key, value in given.items() if key in GROUPS)
    try:
        if _is_packaged(path) and not _has_own_groups():
            composed = _compose_packaged(path, implies_base, groups, _packaged_files())
        else:
            composed = _compose_files(path, implies_base, groups)
        written = OmegaConf.to_container(composed)
        assert isinstance(written, dict)
        for section in written.keys() & sections().keys():
            if not isinstance(written[section], dict):
                raise ConfigError(f"{path}: {explain_section(str(section))}")
        # The config.yaml of a run of 0.1.0 has an old name.
        rename_old(written.get("train", {}))
        settings = OmegaConf.merge(_defaults(), written)
        for key, value in values.items():
            OmegaConf.update(settings, key, value, merge=False)
        return OmegaConf.to_container(settings, resolve=True)
    except InterpolationResolutionError as error:
        key = error.full_key or ""
        where = f"{key}={given[key]}" if key in given else f"{path}: {key}"
        raise ConfigError(
            f"{where} does not fit: a reference ${{...}} in it leads back to it, or to no value."
        ) from None
    except RecursionError:
        raise ConfigError(f"{path}: its defaults lead back to itself: name another file there.") from None
    except MarkedYAMLError as error:
        raise ConfigError(f"{path} is not YAML: {describe_yaml_error(error)}.") from None
    except MissingConfigException as error:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        known = _names_in(*(folder / group for folder in _folders(path)))
        raise ConfigError(f"{path}: {explain_missing(group, name, known)}") from None
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        what = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(f"{path}: {what}: docs/settings.md and --help all list every setting.") from None


def _compose_files(path: Path, implies_base: bool, groups: tuple[str, ...]) -> "DictConfig":
    """Composes the file with the files that it builds on and the chosen file of each group."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    # A program that calls this one may use Hydra too.
    theirs, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    folders = ", ".join(quote(f"file://{folder}") for folder in dict.fromkeys(_folders(path)) if folder.is_dir())
    try:
        with (
            _file_on_base(path, implies_base) as file,
            initialize_config_dir(str(file.parent.resolve()), version_base="1.3"),
            warnings.catch_warnings(),
        ):
            # Without _self_ a file overrides its defaults, as with it.
            warnings.filterwarnings("ignore", ".*Defaults list is missing `_self_`")
            return compose(file.stem, overrides=[f"hydra.searchpath=[{folders}]", *groups])
    finally:
        GlobalHydra.instance().hydra = theirs


def _folders(path: Path) -> list[Path]:
    """Returns the folders of files that a conf builds on: its own, conf/, and the packaged ones."""
    own = [] if _is_packaged(path) else [path.parent]
    return [folder.resolve() for folder in (*own, Path("conf"), packaged_folder())]


def _names_in(*folders: Path) -> list[str]:
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def _is_packaged(path: Path) -> bool:
    return packaged_folder().resolve() in path.resolve().parents


def _has_own_groups() -> bool:
    """Whether conf/ has files of groups, which override packaged ones with the same name."""
    return not _is_packaged(Path("conf") / "base.yaml") and any((Path("conf") / group).is_dir() for group in GROUPS)


def _packaged_files() -> tuple[tuple[str, int, int], ...]:
    """Returns name, time and size of each packaged file. In a clone of the repository the user may change them."""
    stats = ((path.as_posix(), path.stat()) for path in sorted(packaged_folder().rglob("*.yaml")))
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


@functools.lru_cache(maxsize=64)
def _compose_packaged(path: Path, implies_base: bool, groups: tuple[str, ...], _files: tuple) -> "DictConfig":
    """Caches the composition of packaged files, which takes most of the time of loading settings."""
    return _compose_files(path, implies_base, groups)


def _defaults() -> dict[str, Any]:
    """Returns the schema's defaults as a tree, for references to settings that no file sets."""
    tree: dict[str, Any] = {}
    for key, setting in known_keys().items():
        section, _, name = key.rpartition(".")
        if not setting.is_required:
            (tree.setdefault(section, {}) if section else tree)[name] = setting.default
    return tree


@functools.lru_cache(maxsize=64)
def _check_packaged(path: Path, _files: tuple) -> Any:
    return check_yaml(path)


def _check_all(path: Path, chosen: Sequence[str]) -> list[Any]:
    """Checks a file and all files that it builds on; returns their contents, that of the file itself first.

    Args:
        path: the file.
        chosen: names of the chosen files of groups, such as "model/tiny".
    """

    def check(file: Path) -> Any:
        return _check_packaged(file, _packaged_files()) if _is_packaged(file) else check_yaml(file)

    contents = [check(path)]
    folders, seen = _folders(path), {path}
    # A file without `defaults` is on top of base.
    waiting = [*included_files([*chosen, "base", *included_names(path, contents[0])], "", folders)]
    while waiting:
        file, group = waiting.pop()
        if file not in seen:
            seen.add(file)
            contents.append(check(file))
            waiting += included_files(included_names(file, contents[-1]), group, folders)
    return contents


def find_config(name: str) -> Path:
    """Returns the file of conf=NAME.

    Raises:
        ConfigError: there is none; the error suggests the nearest name.
    """
    local = Path("conf")
    for path in (local / f"{name}.yaml", local / f"{name}.yml", packaged_folder() / f"{name}.yaml", Path(name)):
        if path.is_file() and path.suffix in (".yaml", ".yml"):
            return path
    if Path(name).is_file():
        raise ConfigError(f"conf={name} is not a .yaml file: name the settings, such as conf=my_lora.")
    if (inner := Path(name) / "config.yaml").is_file():
        raise ConfigError(f"conf={name} is a folder: use conf={inner}.")
    known = _names_in(local, packaged_folder())
    near = difflib.get_close_matches(name, known, n=1)
    hint = (
        f"; did you mean conf={near[0]}?" if near else f": use one of {', '.join(known)} or the path of a .yaml file."
    )
    raise ConfigError(f"conf={name} is neither conf/{name}.yaml here, nor a packaged file, nor a path{hint}")


def check_override(override: str) -> None:
    """Checks that an argument is a `key=value` whose key is a setting, or a group and the name of one of its files.

    Raises:
        ConfigError: it is not; the error suggests the nearest key or lists the files.
    """
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"{override!r} is not a setting: settings are written key=value, for example train.steps=500."
        )
    if key in GROUPS:
        options = _names_in(Path("conf") / key, packaged_folder() / key)
        if value not in options:
            raise ConfigError(f"{key}={value} does not exist: use one of {', '.join(options)}.")
    elif key not in known_keys():
        raise ConfigError(f"{key} is not a setting{nearest(key, [*known_keys(), *GROUPS])}")


def _is_by_pattern(key: str) -> bool:
    return key in known_keys() and isinstance(known_keys()[key].default, dict)


def _read_value(key: str, value: str) -> Any:
    """Parses the value of a setting on the command line: a list, a mapping, None, or text. The schema converts numbers.

    Raises:
        ConfigError: a list or a mapping cannot be parsed, or a text refers to something else than a setting.
    """
    import yaml
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if key in PROMPTS:
        value = escape_references(value)
    setting, read = known_keys()[key], None if value == "null" else value
    if setting.takes_numbers and _NUMBERS.fullmatch(value) and ("," in value or not setting.takes_one):
        value = f"[{value}]"
    try:
        if _is_by_pattern(key):
            # Hydra's grammar does not allow quotes in the keys of a mapping.
            read = read_plain_yaml(value)
        elif value.startswith("[") and setting.takes_list:
            read = OverridesParser.create().parse_override(f"{key}={value}").value()
    except (HydraException, yaml.YAMLError):
        raise ConfigError(does_not_fit(f"{key}={value}", key)) from None
    for text in texts_in(read):
        check_references(text, f"{key}={value} does not fit")
    return read


def quote(text: str) -> str:
    """Returns a text in quotes, as Hydra's grammar reads it back."""
    # To Hydra a backslash is special only before a quote.
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)$", r"\1\1", text)) + "'"


def config_yaml(config: RunConfig) -> str:
    """Returns the resolved settings as YAML that `conf=` can load."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(escape_references(config.model_dump())))


def run_config_yaml(config: RunConfig) -> str:
    """Returns the settings that a run folder keeps: those of `config_yaml`, without how one start resumed."""
    return config_yaml(config.model_copy(update=ONE_START))


def weights_paths(config: RunConfig) -> WeightsPaths:
    """Returns the paths of the weights; "package:NAME" is a folder shipped with mochi-tune."""
    model = config.model
    own = (model.transformer, model.vae, model.text_encoder, model.tokenizer)
    return WeightsPaths(weights_folder(config), *(Path(path) if path else None for path in own), variant=model.variant)


def weights_folder(config: RunConfig) -> Path:
    """Returns the folder or file of model.weights."""
    kind, colon, name = config.model.weights.partition(":")
    if kind == "package" and colon:
        from mochi_tune import assets

        return assets.FOLDER / name
    return Path(config.model.weights)
