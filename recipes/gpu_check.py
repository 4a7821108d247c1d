"""Checks and measures a GPU in under 8 minutes: `python -m mochi_tune.recipes.gpu_check [OUT.jsonl]`.

Each part is a separate process with a time limit, the most important first, and writes a line of JSON when it ends. A
part that hangs, crashes or runs out of memory only costs its line. The parts need torch, peft, accelerate,
transformers, safetensors, hydra, pydantic and torchao; nf4 also needs bitsandbytes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

# Time limit of all parts together.
TOTAL_SECONDS = 470
REFERENCE = Path(__file__).parents[1] / "tests" / "golden"


@dataclass(frozen=True)
class Part:
    """A command of mochi-tune, and its time limit in seconds."""

    arguments: tuple[str, ...]
    limit: float


def _bench(settings: str, limit: float) -> Part:
    return Part(("bench", *settings.split(), "repeats=2"), limit)


PARTS = [
    Part(("verify", f"reference={REFERENCE}", "device=cuda", "dtype=bf16"), 40),
    _bench("what=train num_frames=37", 75),
    # These two have not run on a GPU yet; the second needs bitsandbytes.
    _bench("what=train num_frames=163", 100),
    _bench("what=train num_frames=37 precision=nf4 memory=12gb limit_gib=12", 80),
    _bench("what=sample num_frames=163", 60),
    # Emulates a smaller card: the limit is strict and includes fragmentation.
    _bench("what=train num_frames=37 memory=12gb limit_gib=12", 75),
    _bench("what=train num_frames=37 precision=fp8", 75),
    _bench("what=decode num_frames=163", 45),
    _bench("what=encode num_frames=37", 30),
    _bench("what=train num_frames=163 memory=12gb limit_gib=23", 100),
    _bench("what=train num_frames=37 memory=16gb limit_gib=16", 75),
    _bench("what=train num_frames=37 recompute=block", 75),
    _bench("what=train num_frames=37 precision=fp8 recompute=block", 75),
    Part(("verify", f"reference={REFERENCE}", "device=cuda", "dtype=fp32"), 40),
    _bench("what=sample num_frames=163 memory=24gb compile=true", 100),
    _bench("what=sample num_frames=163 memory=24gb compile=false", 60),
    _bench("what=train num_frames=85", 75),
    _bench("what=train num_frames=163 precision=fp8", 100),
    _bench("what=train num_frames=37 precision=int8 recompute=attention", 80),
    _bench("what=sample num_frames=163 compile=true", 90),
]


def main(out: Path, parts: Sequence[Part] = tuple(PARTS), total_seconds: float = TOTAL_SECONDS) -> int:
    """Runs the parts in order until the time is over; appends a line of JSON for each to `out`.

    A line has the command, its exit code (null after a timeout), its seconds, the result of `bench` or the last lines
    of another command, and the last lines of an error.

    Returns:
        The number of failed parts.
    """
    begun, num_failed = time.monotonic(), 0
    for part in parts:
        left = total_seconds - (time.monotonic() - begun)
        if left <= 0:
            tqdm.write(f"no time left for: {' '.join(part.arguments)}")
            continue
        line = run_part(part, min(part.limit, left))
        num_failed += line["exit_code"] != 0
        with open(out, "a") as file:
            file.write(json.dumps(line) + "\n")
        tqdm.write(json.dumps(line))
    return num_failed


def run_part(part: Part, limit: float) -> dict[str, object]:
    """Runs one part; returns its line."""
    begun = time.monotonic()
    command = [sys.executable, "-m", "mochi_tune.cli", *part.arguments]
    # A new session, so that its child processes end with it: the workers of a compiler also hold the pipes open.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=limit)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        (output, errors), code = process.communicate(), None
    line: dict[str, object] = {"command": " ".join(part.arguments), "exit_code": code}
    line["seconds"] = round(time.monotonic() - begun, 1)
    if code == 0:
        line["result"] = result_of(output)
    else:
        line["error"] = _tail(errors) or _tail(output)
    return line


def result_of(output: str) -> object:
    """Returns the JSON of an output, which other lines may precede and follow; without any, its last lines."""
    _, _, text = f"\n{output}".partition("\n{\n")
    try:
        return json.JSONDecoder().raw_decode("{\n" + text)[0]
    except json.JSONDecodeError:
        return _tail(output)


def _tail(text: str) -> list[str]:
    return text.strip().splitlines()[-5:]


if __name__ == "__main__":
    sys.exit(bool(main(Path(sys.argv[1] if len(sys.argv) > 1 else "gpu.jsonl"))))
