"""The verb `ui`: opens the web page."""

import importlib.util
import os
from pathlib import Path

from mochi_tune.cli.options import UI_OPTIONS, plain_options
from mochi_tune.cli.values import user_path, whole_number
from mochi_tune.errors import ConfigError

# Variables that gradio and its libraries read at import: no telemetry, look-ups or downloads.
QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_SSR_MODE": "False",
    "GRADIO_MCP_SERVER": "False",
    "GRADIO_SHARE": "False",
}


def run_ui(arguments: list[str]) -> int:
    """Serves the page of a folder until it is stopped; the programs that it has started continue."""
    options = plain_options("ui", arguments, UI_OPTIONS)
    if options is None:
        return 0
    if missing := [name for name in ("gradio", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"`ui` needs {missing[0]}, which is not installed: pip install 'mochi-tune[ui]'.")
    from mochi_tune.ui.folder import open_page_file
    from mochi_tune.ui.server import bind, build_app, check_host, serve

    folder = user_path(options["folder"])
    if not folder.is_dir():
        raise ConfigError(f"folder={options['folder']} is not a folder: name the one that holds conf, videos and runs.")
    password = options["password"] or os.environ.get("MOCHI_TUNE_UI_PASSWORD", "")
    host = options["host"]
    check_host(host, password)
    bound = bind(host, whole_number("port", options["port"], 0))
    address = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}/"
    # Settings name files relative to the folder, as on a command line in it.
    os.chdir(folder)
    folder = Path.cwd()
    # The programs that the page starts do not need its password.
    os.environ.pop("MOCHI_TUNE_UI_PASSWORD", None)
    # On the disk of the videos, so that uploads need not be copied from another disk.
    os.environ.update(QUIET | {"GRADIO_TEMP_DIR": str(folder / ".mochi_tune" / "uploads")})
    from mochi_tune.ui.page import build_page, looks

    app = build_app(folder, host, password, build_page(folder), looks())
    with open_page_file(folder, address) as other:
        if other:
            print(f"{folder} has another page at {other}: both can be used, and show the same jobs and files")
        print(f"the page of {folder}: {address} (Ctrl-C ends it, not the programs that it has started)", flush=True)
        serve(app, bound)
    return 0
