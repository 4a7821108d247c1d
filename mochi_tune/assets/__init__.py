"""Files shipped with the package: the tiny and the toy model, and reference vectors of the official implementation."""

from pathlib import Path

FOLDER = Path(__file__).parent
