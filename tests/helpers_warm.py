"""What children of the tests need before they do anything: imported once, in the process that they are forked from."""

from helpers_parallel import restore_path

import mochi_tune.cli.main  # noqa: F401
from mochi_tune.config.load import load_config

restore_path()
for name, groups in (("my_lora", []), ("my_lora", ["model=tiny"]), ("toy_lora", [])):
    load_config(name, groups)
