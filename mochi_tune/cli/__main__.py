"""Runs the command line as `python -m mochi_tune.cli`."""

from mochi_tune.cli.main import main

if __name__ == "__main__":
    main()
