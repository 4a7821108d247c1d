"""Runs checks of CUDA kernels by Triton's interpreter, on a CPU."""

import os
import subprocess
import sys


def run_interpreted(check: str) -> str:
    """Runs a program in a process of its own, as Triton must be told before it is imported; returns what it prints."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip()
