"""Python runs this at its start where this folder is on PYTHONPATH: processes that a launcher starts are held too."""

import json
import os

import helpers_hold

helpers_hold.hold(*json.loads(os.environ["MOCHI_TUNE_TEST_HOLD"]))
