"""Generates the list of settings in the help and docs/settings.md from the schema.

`python -m mochi_tune.config.docs > docs/settings.md` regenerates the page.
"""

import sys

from mochi_tune.config.explain import as_yaml, describe_type
from mochi_tune.config.load import packaged_folder
from mochi_tune.config.settings import GROUPS, Setting, known_keys, sections

RESUMING = {"free": "yes", "bound": "by resume=force", "held": "no"}
PAGE = """\
# Settings

Any setting is given as `key=value` on the command line of `prepare`, `train` and `sample`, or in a file, where the part
of the key before the dot is a section:

```yaml
defaults: [base, _self_]
name: my_lora
train:
  steps: 500
```

The command line overrides the file, the file the packaged files below, and those the defaults.
`${name}` in a value is the value of another setting; in a prompt on the command line it is text. The
settings of a run have at most 20 such references.

The last column says whether a run may go on from a checkpoint with another value. `by resume=force` means that it goes
on as another run, which `history.jsonl` records. A run also keeps the size of the cached clips, and the product of
batch size, accumulation steps and data-parallel processes.

This page is made from [schema.py](../mochi_tune/config/schema.py) by `python -m mochi_tune.config.docs`.
"""


def settings_help() -> str:
    """Returns the list of settings for the command line: two lines per setting, by section."""
    lines = ["Packaged files, chosen as group=name:"]
    for group, files in packaged_files().items():
        lines += ["", *(f"  {f'{group}={name}':<24} {meaning}" for name, meaning in files.items())]
    for section, cls in sections().items():
        lines += ["", f"{section or 'run'}: {(cls.__doc__ or '').splitlines()[0]}"]
        for setting in _settings_of(section):
            given = f"{setting.key}={'' if setting.is_required else as_yaml(setting.default)}"
            lines += [f"  {given:<44} {describe_type(setting)}", f"      {setting.meaning}"]
    return "\n".join(lines) + "\n"


def settings_page() -> str:
    """Returns docs/settings.md."""
    lines = [PAGE, "## Packaged files", "", "| choice | what it sets |", "| --- | --- |"]
    for group, files in packaged_files().items():
        lines += [f"| [`{group}={name}`](../conf/{group}/{name}.yaml) | {text} |" for name, text in files.items()]
    for section, cls in sections().items():
        lines += ["", f"## {section or 'The run'}", "", cls.__doc__ or "", ""]
        lines += ["| setting | default | takes | meaning | may change |", "| --- | --- | --- | --- | --- |"]
        for setting in _settings_of(section):
            default = f"(by `{section}=NAME`)" if setting.is_required else f"`{as_yaml(setting.default) or '(empty)'}`"
            cells = (f"`{setting.key}`", default, describe_type(setting), setting.meaning, RESUMING[setting.resume])
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def packaged_files() -> dict[str, dict[str, str]]:
    """Returns the packaged files of each group: their names and first comments."""
    paths = {group: sorted((packaged_folder() / group).glob("*.yaml")) for group in GROUPS}
    return {group: {path.stem: _first_comment(path.read_text()) for path in paths[group]} for group in GROUPS}


def _first_comment(text: str) -> str:
    return next(line[2:] for line in text.splitlines() if line.startswith("# ") and not line.startswith("# @"))


def _settings_of(section: str) -> list[Setting]:
    return [setting for setting in known_keys().values() if setting.key.rpartition(".")[0] == section]


if __name__ == "__main__":
    sys.stdout.write(settings_page())
