"""Lists the adapter files of the folder, and builds the arguments of `lora` and `export` for them."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mochi_tune.adapters.files import check_format
from mochi_tune.adapters.low_rank import Limit
from mochi_tune.config.values import is_repo
from mochi_tune.errors import ConfigError, DataError
from mochi_tune.training.card import DIFFUSERS_FILE
from mochi_tune.training.checkpoint import find_checkpoints, published_file
from mochi_tune.training.records import find_run_dir
from mochi_tune.ui.folder import changed_at, inside, relative
from mochi_tune.ui.runs import folder_state, list_runs

# Folder of the files that the page makes. Adapters that the user copies there are listed, too.
MADE_FOLDER = "loras"
HUB = "hub:"


def list_adapters(folder: Path) -> list[tuple[str, str]]:
    """Returns (description, path in the folder) of each adapter: results and checkpoints of runs, then other files."""
    found = []
    for run in list_runs(folder):
        run_dir = folder / run
        if (run_dir / "adapter.safetensors").is_file():
            found.append((f"{run_dir.name}, the result", f"{run}/adapter.safetensors"))
        for checkpoint in reversed(find_checkpoints(run_dir / "checkpoints")):
            path = published_file(checkpoint)
            if path.is_file():
                # A copy of a checkpoint may have any name, such as step_000100_kept.
                number = checkpoint.name.removeprefix("step_")
                label = f"step {int(number)}" if number.isdecimal() else checkpoint.name
                found.append((f"{run_dir.name}, {label}", path.relative_to(folder).as_posix()))
    others = sorted((folder / MADE_FOLDER).glob("*.safetensors"))
    return found + [(path.name, path.relative_to(folder).as_posix()) for path in others if path.is_file()]


def adapters_state(folder: Path) -> list[Any]:
    """Returns a state that changes with the adapters of runs and with the files in `loras/`."""
    made = [path for path in (folder / MADE_FOLDER).rglob("*") if path.is_file()]
    results = [
        (run, (folder / run / "adapter.safetensors").is_file(), folder_state(folder / run / "checkpoints"))
        for run in list_runs(folder)
    ]
    return [results, sorted((str(path), changed_at(path)) for path in made)]


def check_adapter(folder: Path, name: str) -> str:
    """Returns an adapter as an argument: a path in the folder, or `hub:OWNER/NAME`.

    Raises:
        MochiTuneError: the name is empty, or the file does not exist or is outside of the folder.
    """
    name = name.strip()
    if not name:
        raise ConfigError("no adapter is chosen: choose one from the list.")
    if name.startswith(HUB):
        return name
    path = inside(folder, name)
    if not path.exists():
        raise DataError(f"{name} does not exist: choose an adapter from the list, or write hub:OWNER/NAME.")
    return relative(folder, path)


def plain_name(adapter: str) -> str:
    """Returns the name of an adapter for the names of files made from it."""
    path = Path(adapter.removeprefix(HUB).partition("@")[0])
    if path.parent.parent.name == "checkpoints":
        return f"{path.parent.parent.parent.name}_{path.parent.name}"
    return path.parent.name if path.name == "adapter.safetensors" and path.parent.name else path.stem


def new_file(folder: Path, wanted: str, default: str, suffix: str = ".safetensors") -> str:
    """Returns the path of a new file or folder, relative to the page's folder.

    Args:
        folder: folder of the page.
        wanted: path that the user has entered; "": `default`, with a number if that exists.
        default: default path without its suffix.
        suffix: suffix of the file; "" for a folder.

    Raises:
        MochiTuneError: the path exists, has another suffix, or is outside of the folder.
    """
    if wanted := wanted.strip():
        path = inside(folder, wanted if "/" in wanted else f"{MADE_FOLDER}/{wanted}")
        if suffix and path.suffix != suffix:
            raise ConfigError(f"{wanted} must end in {suffix}: add it.")
        if path.exists():
            raise ConfigError(f"{wanted} exists already, and the page never replaces adapters: choose another name.")
        return relative(folder, path)
    number = 1
    while True:
        name = f"{default}{'' if number == 1 else f'_{number}'}{suffix}"
        if not inside(folder, name).exists():
            return name
        number += 1


def inspect_page(folder: Path, adapter: str) -> str:
    """Returns the path for the page of `lora inspect` on a file, which changes whenever the file does."""
    facts = inside(folder, adapter).stat()
    digest = hashlib.sha256(os.fsencode(adapter) + f"{facts.st_mtime_ns} {facts.st_size}".encode()).hexdigest()[:8]
    return f"{MADE_FOLDER}/inspect/{plain_name(adapter)}_{digest}.html"


def limit_arguments(rank: str, energy: str) -> list[str]:
    """Returns `rank=` or `energy=` as an argument, [] if both are empty.

    Raises:
        ConfigError: both are given, or a value does not fit.
    """
    given = {key: text.strip() for key, text in (("rank", rank), ("energy", energy)) if text.strip()}
    if given:
        numbers = {key: number_of(key, text) for key, text in given.items()}
        if "rank" in numbers and numbers["rank"] != int(numbers["rank"]):
            raise ConfigError(f"rank={rank} does not fit: it takes a whole number of at least 1.")
        Limit(int(numbers["rank"]) if "rank" in numbers else None, numbers.get("energy"))
    return [f"{key}={text}" for key, text in given.items()]


def number_of(key: str, text: str) -> float:
    """Returns the number of a text.

    Raises:
        ConfigError: the text is not a finite number.
    """
    import math

    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{key}={text} does not fit: use a number such as 0.8.")
    return number


def merge_arguments(
    folder: Path, adapters: Sequence[str], strengths: str, limit: tuple[str, str], out: str
) -> list[str]:
    """Returns the arguments of `lora merge`.

    Raises:
        MochiTuneError: fewer than two adapters are given, the number of strengths is another one, or as the functions
            `check_adapter`, `limit_arguments` and `new_file`.
    """
    files = [check_adapter(folder, name) for name in adapters]
    if len(files) < 2:
        raise ConfigError(f"a merge takes two adapters or more, and {len(files)} is chosen: choose another one.")
    if hub := [file for file in files if file.startswith(HUB)]:
        raise ConfigError(f"{hub[0]} is not a file of this folder: export it first, to=native, and merge that.")
    texts = strengths.replace(",", " ").split()
    if texts and len(texts) != len(files):
        raise ConfigError(f"there are {len(texts)} strengths for {len(files)} adapters: give one for each, or none.")
    for text in texts:
        number_of("strengths", text)
    given = [f"strengths=[{','.join(texts)}]"] if texts else []
    default = f"{MADE_FOLDER}/{'_and_'.join(map(plain_name, files))[:100]}"
    return ["merge", *files, *given, *limit_arguments(*limit), f"out={new_file(folder, out, default)}"]


def resize_arguments(folder: Path, adapter: str, limit: tuple[str, str], out: str) -> list[str]:
    """Returns the arguments of `lora resize`.

    Raises:
        MochiTuneError: neither or both of rank and energy are given, or as `check_adapter` and `new_file`.
    """
    file = check_adapter(folder, adapter)
    given = limit_arguments(*limit)
    if not given:
        Limit(None, None)
    word = given[0].replace("=", "_").replace(".", "_")
    return ["resize", file, *given, f"out={new_file(folder, out, f'{MADE_FOLDER}/{plain_name(file)}_{word}')}"]


def export_arguments(folder: Path, adapter: str, to: str, dtype: str, out: str) -> list[str]:
    """Returns the arguments of `export` into a file.

    Raises:
        MochiTuneError: the format is unknown, or as `check_adapter` and `new_file`.
    """
    file = check_adapter(folder, adapter)
    check_format(to)
    default = f"{MADE_FOLDER}/{plain_name(file)}_{to}{'' if dtype == 'fp32' else f'_{dtype}'}"
    return [f"adapter={file}", f"to={to}", f"dtype={dtype}", f"out={new_file(folder, out, default)}"]


@dataclass(frozen=True)
class Push:
    """A request to publish an adapter.

    Attributes:
        adapter: path in the folder, or `hub:OWNER/NAME`.
        repo: owner/name on the hub.
        formats: formats of the files.
        dtype: dtype of the files.
        is_private: whether a new repository is private.
        license: license identifier of the hub; "" for that of the adapter.
        trigger: words that a prompt needs; "" for those of the adapter.
    """

    adapter: str
    repo: str
    formats: tuple[str, ...] = ("diffusers",)
    dtype: str = "fp32"
    is_private: bool = True
    license: str = ""
    trigger: str = ""

    def arguments(self, folder: Path, is_dry: bool) -> list[str]:
        """Returns the arguments of `export` into a new folder in `loras/hub`, which uploads it unless `is_dry`.

        Raises:
            MochiTuneError: the repository's name is not possible, no format is chosen, or the adapter does not exist.
        """
        file = check_adapter(folder, self.adapter)
        repo = self.repo.strip()
        if not is_repo(repo):
            raise ConfigError(f"push={repo} is not possible: use owner/name, of letters, digits, -, . and _.")
        if not self.formats:
            raise ConfigError("no format is chosen: choose diffusers, which most programs read.")
        for to in self.formats:
            check_format(to)
        about = {"license": self.license.strip(), "trigger": self.trigger.strip()}
        return [
            f"adapter={file}", f"push={repo}", f"to={','.join(self.formats)}", f"dtype={self.dtype}",
            f"private={'true' if self.is_private else 'false'}", *(f"{k}={v}" for k, v in about.items() if v),
            *(["dry_run=true"] if is_dry else []),
            f"out={new_file(folder, '', f'{MADE_FOLDER}/hub/{plain_name(file)}', '')}",
        ]  # fmt: skip

    def explain(self, folder: Path) -> list[str]:
        """Describes in lines what an upload would send. It writes nothing and uses no network.

        Raises:
            MochiTuneError: as `arguments`.
        """
        self.arguments(folder, is_dry=False)
        files = [DIFFUSERS_FILE if to == "diffusers" else f"NAME_{to}.safetensors" for to in self.formats]
        run_dir = None if self.adapter.startswith(HUB) else find_run_dir(inside(folder, self.adapter))
        extra = "; from the run: its last eval videos, eight at most, the curve and a table of the training"
        made = "private" if self.is_private else "open to everybody"
        return [
            f"{', '.join(files)}, in {self.dtype}",
            f"README.md, the model card, with license and trigger words{extra if run_dir else ''}",
            "no names of clips, no captions and no paths; the prompts of the videos are on the card",
            f"to {self.repo.strip()}: a new repository is {made}; in an existing one, files of the same names are "
            "replaced, and others stay",
        ]
