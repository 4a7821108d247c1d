"""The verb `export`, and the upload at the end of `train`."""

import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mochi_tune.cli.options import EXPORT_OPTIONS, plain_options
from mochi_tune.cli.values import hub_address, positive_number, true_or_false, user_path
from mochi_tune.errors import ConfigError, MochiTuneError, printable

if TYPE_CHECKING:
    from mochi_tune.config.schema import RunConfig
    from mochi_tune.recipes.publish import Publication

# Names of the options in ModelSpec.
ABOUT = {"title": "title", "author": "author", "license": "license", "trigger": "trigger_phrase"}


def run_export(arguments: list[str]) -> int:
    """Converts an adapter file, or creates a folder with a model card and uploads it."""
    options = plain_options("export", arguments, EXPORT_OPTIONS)
    if options is None:
        return 0
    to, out, repo = (options[key] for key in ("to", "out", "push"))
    adapter = os.path.expanduser(options["adapter"])
    is_dry, is_private = (true_or_false(key, options[key]) for key in ("dry_run", "private"))
    about = {name: options[key] for key, name in ABOUT.items()}
    alpha = positive_number("adapter_alpha", options["adapter_alpha"]) if options["adapter_alpha"] else None
    is_folder = bool(repo) or is_dry or (bool(out) and not Path(out).suffix)
    endpoint = hub_address(options["endpoint"])
    if is_folder and out.endswith(".safetensors"):
        raise ConfigError(
            f"out={out} names a file, and push= and dry_run= make a folder: remove out=, or name a folder."
        )
    if missing := [key for key, value in (("to", to), ("out", out)) if not value and not is_folder]:
        needed = ", ".join(f"{key}=..." for key in missing)
        raise ConfigError(f"export needs {needed}: see `mochi-tune export --help`.")
    if not is_folder:
        if unused := [key for key in ("private", "endpoint") if options[key] != EXPORT_OPTIONS[key][0]]:
            raise ConfigError(f"{unused[0]}={options[unused[0]]} is for uploads, and there is no push=: leave it out.")
        from mochi_tune.recipes.export import main as export

        summary = export(adapter, to, user_path(out), options["dtype"], about, alpha)
        print(printable(summary.source_note), file=sys.stderr)
        print(printable(str(summary)))
        return 0
    from mochi_tune.adapters.resolve import HUB, find_adapter_file
    from mochi_tune.recipes.publish import Publication, check_repo, default_folder
    from mochi_tune.weights.push import check_login

    formats = tuple(dict.fromkeys((to or "diffusers").split(",")))
    source = find_adapter_file(adapter)
    publication = Publication(source, formats, options["dtype"], repo, about, alpha, is_private)
    check_repo(repo)
    if repo and not is_dry:
        check_login("push", repo)
    folder = user_path(out) if out else default_folder(source)
    if not out and adapter.startswith(HUB):
        # The file is in the hub's cache, which is not the place for the folder.
        folder = Path("hub") / re.split(r"[/@]", adapter)[1]
    publish(publication, folder, None if is_dry or not repo else is_private, endpoint)
    return 0


def publish(publication: "Publication", folder: Path, is_private: bool | None, endpoint: str | None = None) -> None:
    """Creates the folder and prints what is in it; uploads it unless `is_private` is None."""
    from mochi_tune.recipes.publish import main

    made = main(publication, folder)
    for note in dict.fromkeys(summary.source_note for summary in made.files):
        print(printable(note), file=sys.stderr)
    for line in [*made.files, *made.notes]:
        print(line)
    print(made.path / "README.md", flush=True)
    if is_private is not None:
        _send(folder, publication.repo, is_private, endpoint)


def _send(folder: Path, repo: str, is_private: bool, endpoint: str | None = None) -> None:
    """Uploads a folder, and records next to it where it was uploaded."""
    from mochi_tune.weights.push import upload

    print(upload(folder, repo, is_private, endpoint))
    _sent_note(folder).write_text(f"{repo}\n")


def _sent_note(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.uploaded")


def check_push(config: "RunConfig") -> None:
    """Refuses a run that is to be uploaded when there is no login.

    Raises:
        ConfigError: there is no login.
    """
    if config.publish.push is not None:
        from mochi_tune.weights.push import check_login

        check_login("publish.push", config.publish.push)


def push_trained(config: "RunConfig") -> int:
    """Uploads the adapter of a finished run if `publish.push` is set.

    Returns the exit code: 0, or 1 if the upload failed, which a line reports.
    """
    settings, adapter = config.publish, Path(config.run_dir) / "adapter.safetensors"
    if settings.push is None:
        return 0
    from mochi_tune.recipes.publish import Publication, default_folder

    about = {name: getattr(settings, key) or "" for key, name in ABOUT.items()}
    folder = None
    try:
        folder = default_folder(adapter)
        if folder.exists():
            # The folder gets its name when it is complete. Only a failed upload is repeated, because the files on the
            # hub may have been edited there.
            note = _sent_note(folder)
            if note.exists() and note.read_text().strip() == settings.push:
                print(f"{folder} is already on {settings.push}: nothing is uploaded")
            else:
                _send(folder, settings.push, settings.private)
            return 0
        publish(
            Publication(adapter, repo=settings.push, about=about, is_private=settings.private), folder, settings.private
        )
    except (MochiTuneError, OSError) as error:
        again = shlex.join(["mochi-tune", "export", f"adapter={adapter}", f"push={settings.push}"])
        # If the folder exists, the error says how to upload it.
        way_on = "" if folder and folder.exists() else f": `{again}` tries again"
        reason = " ".join(str(error).split())
        print(f"mochi-tune: {adapter} is trained and saved, but not uploaded: {reason}{way_on}", file=sys.stderr)
        return 1
    return 0
