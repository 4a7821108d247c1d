"""The verb `init`: creates the files for a first LoRA."""

from pathlib import Path

from mochi_tune.errors import ConfigError

README = """\
Put each clip here as NAME.mp4 and its caption next to it as NAME.txt: a few sentences, written like a prompt.
`mochi-tune inspect conf={name}` writes a page that shows the clips as the model will see them.
"""


def run_init(arguments: list[str]) -> int:
    """Writes conf/NAME.yaml and videos/README.md; never replaces a file."""
    if arguments[:1] in (["--help"], ["-h"]):
        print("mochi-tune init NAME: writes conf/NAME.yaml, with comments, and videos/ with a README")
        return 0
    name = arguments[0].removeprefix("name=") if len(arguments) == 1 else ""
    if not name[:1].isalnum() or not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"init takes one NAME of letters, digits, - and _, got {' '.join(arguments) or 'none'}.")
    from mochi_tune.config.load import packaged_folder
    from mochi_tune.files import make_writable_folder, write_new

    if name == "base":
        raise ConfigError("init base is not possible: every conf builds on the packaged base: choose another name.")
    path, readme = Path("conf") / f"{name}.yaml", Path("videos") / "README.md"
    if taken := next((each for each in (path, path.with_suffix(".yml")) if each.exists()), None):
        raise ConfigError(f"{taken} exists and is never replaced: choose another name, or edit it.")
    for folder in (path.parent, readme.parent):
        make_writable_folder(folder)
    content = (packaged_folder() / "my_lora.yaml").read_text().replace("name: my_lora ", f'name: "{name}" ')
    content = content.replace(
        "copy it to conf/NAME.yaml and run every verb with conf=NAME", f"run every verb with conf={name}"
    )
    written = {readme: README.format(name=name)} if not readme.exists() else {}
    # Last, as a conf that exists refuses to repeat what a killed process has not written.
    for file, text in {**written, path: content}.items():
        write_new(file, text.encode())
        print(f"wrote {file}")
    print(f"Put clips and captions into videos/, then: mochi-tune inspect conf={name}")
    return 0
