"""Writes the page of a run, RUN_DIR/report.html, from the files of the run: curves, eval videos and next steps.

The page needs no network. It links to the videos by relative paths, so the run folder can be moved or copied as a
whole.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from math import isfinite
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mochi_tune.config.load import load_config, run_config_yaml
from mochi_tune.errors import counted
from mochi_tune.files import read_json_lines, write_atomic
from mochi_tune.pages import charts, video_tables
from mochi_tune.pages.charts import running_mean
from mochi_tune.pages.html_page import Head, document, scrollable, section
from mochi_tune.parallel.forecast import in_words
from mochi_tune.training.checkpoint import find_checkpoints, published_file, step_of
from mochi_tune.training.eval_files import find_eval_videos, prompt_of
from mochi_tune.training.metrics import best_validation, comparable, read_new_rows, write_line
from mochi_tune.training.report_curves import draw_curves, mean_window
from mochi_tune.training.resume import read_clips
from mochi_tune.training.run_folder import read_history

if TYPE_CHECKING:
    from mochi_tune.config.schema import RunConfig

PAGE = "report.html"
# The numbers of metrics.jsonl that the page uses.
CURVES = ("loss", "lr", "seconds", "memory_gib")
STYLE = """
h1{overflow-wrap:anywhere}header p{overflow-wrap:anywhere}
.facts{display:grid;gap:.9rem 2rem;margin:0;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr))}
.facts dt{color:var(--soft);font-size:.85rem}.facts dd{margin:0;overflow-wrap:anywhere}
.samples{table-layout:fixed}
.samples thead th{padding-bottom:0;font-variant-numeric:tabular-nums}
.samples tbody th{padding-top:.7rem;color:var(--ink);font-weight:600;font-size:.95rem}
.samples tbody th span{position:sticky;left:0;display:block;max-width:min(70ch,calc(100vw - 3.5rem));
overflow-wrap:anywhere}
.samples .best{color:var(--accent)}
.pair{position:relative;width:clamp(min(19rem,100vw - 4.5rem),(min(100vw,1148px) - 4.5rem)/var(--n) - .6rem,36rem)}
.pair video,.pair img{width:100%}
.pair::after{content:"";position:absolute;left:calc(50% - 1px);top:0;bottom:1.5rem;width:2px;background:var(--back);
pointer-events:none}
.pair div{display:grid;grid-template-columns:1fr 1fr;height:1.5rem;padding-top:.15rem;color:var(--soft);font-size:.8rem}
.pair div span{padding:0 .4rem}
pre{margin:.3rem 0 1.2rem;padding:.8rem 1rem;border:1px solid var(--rule);border-radius:6px;
font:.82rem/1.5 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;white-space:pre-wrap;
overflow-wrap:anywhere}
details{margin-top:1.2rem}details summary{cursor:pointer;color:var(--soft)}details pre{columns:3 17rem;column-gap:2rem}
@media(max-width:30rem){.figures{grid-template-columns:1fr 1fr}.figures .value{font-size:1.6rem}}
@media print{section,figure{break-inside:avoid}.scroll{overflow:visible}}
"""


class StepRows:
    """The numbers of metrics.jsonl. Each row is read only once, although the page is written after each validation.

    This relies on the file only growing during a training; rows after the checkpoint are removed before it starts.

    Attributes:
        step: the step of the last row, 0 without rows.
        most_clips: maximum number of clips of a step.
        curves: the finite values of each number, by name, as (step, value).
    """

    def __init__(self, path: Path) -> None:
        self.path, self._num_bytes = path, 0
        self.step = self.most_clips = 0
        self.curves: dict[str, list[tuple[int, float]]] = {name: [] for name in CURVES}

    def read_on(self) -> None:
        """Reads the rows that were added since the last call; an incomplete last line is read once it is complete."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self._num_bytes)
            rows = read_new_rows(file)
            self._num_bytes = file.tell()
        for row in rows:
            if isinstance(step := row.get("step"), int):
                self.step, self.most_clips = step, max(self.most_clips, len(row.get("clips", ())))
                for name, points in self.curves.items():
                    if name in row and isfinite(row[name]):
                        points.append((step, row[name]))


@dataclass(frozen=True)
class RunFiles:
    """The content of the files of a run folder.

    Attributes:
        run_dir: the run folder.
        config: the settings.
        steps: the numbers of metrics.jsonl.
        validations: the rows of validation.jsonl with a finite loss, sorted by step.
        starts: the rows of the history, oldest first.
        clips: the content of clips.json.
    """

    run_dir: Path
    config: "RunConfig"
    steps: StepRows
    validations: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    clips: dict[str, Any]

    @property
    def step(self) -> int:
        """The last finished step."""
        return self.steps.step

    @property
    def best(self) -> tuple[int, float] | None:
        """The step of the lowest validation loss and that loss; None without a validation."""
        return best_validation(self.validations)

    def curve(self, name: str) -> list[tuple[int, float]]:
        """Returns (step, value) of a number; `name` is one of CURVES."""
        return self.steps.curves[name]


class ReportWriter:
    """Keeps the page of a run up to date; if it cannot be written, prints a line and the run continues."""

    def __init__(self, run_dir: Path, config: "RunConfig") -> None:
        self.run_dir, self.config = run_dir, config
        self.has_failed = False
        self.run: RunFiles | None = None
        self._steps = StepRows(run_dir / "metrics.jsonl")

    def write(self) -> None:
        """Writes the page, which takes less than a second; raises no exception."""
        try:
            self.run = read_files(self.run_dir, self.config, self._steps)
            write_atomic(self.run_dir / PAGE, make_report(self.run).encode())
            self.has_failed = False
        except Exception as error:  # noqa: BLE001  (no page is worth a run)
            if not self.has_failed:
                write_line(f"{self.run_dir / PAGE} cannot be written ({error}): the run goes on without it")
            self.has_failed = True

    def closing_lines(self) -> list[str]:
        """Returns the last lines that a finished run prints; [] if its files could not be read."""
        if self.run is None:
            return []
        kept = _kept_steps(self.run)
        # The adapter is that of the newest checkpoint; rows of later steps may remain from a run that was killed.
        step = max(kept, default=self.run.step)
        losses = {row["step"]: row["validation_loss"] for row in self.run.validations}
        last = f"step {step}" + (f", validation loss {losses[step]:.4f}" if step in losses else "")
        lines = [f"last: {last}"]
        if self.run.best is not None:
            best, loss = self.run.best
            gone = "" if best in (0, *kept) else "; its checkpoint was not kept"
            both = [f"best: step {best}, validation loss {loss:.4f}{gone}", *lines]
            lines = [f"best and last: {last}"] if best == step else both
        lines += [] if self.has_failed else [f"report: {self.run_dir / PAGE}"]
        return lines + [f"next: {command}" for _, command in next_steps(self.run)[:1]]


def read_files(run_dir: Path, config: "RunConfig | None" = None, steps: StepRows | None = None) -> RunFiles:
    """Reads the files of a run folder.

    Args:
        run_dir: the folder.
        config: the settings of the run; None to read its config.yaml.
        steps: the rows that were read before, if any.

    Raises:
        ConfigError: this version cannot read the config.yaml of the run.
    """
    steps = steps or StepRows(run_dir / "metrics.jsonl")
    steps.read_on()
    return RunFiles(
        run_dir,
        config or load_config(str(run_dir / "config.yaml"), []),
        steps,
        sorted(
            (
                row
                for row in read_json_lines(run_dir / "validation.jsonl")
                if isfinite(row.get("validation_loss") or float("nan"))
            ),
            key=lambda row: row["step"],
        ),
        read_history(run_dir),
        read_clips(run_dir),
    )


def make_report(run: RunFiles) -> str:
    """Returns the page as HTML."""
    parts = [_samples(run), draw_curves(run), _next_steps(run), _settings(run)]
    style = charts.STYLE + video_tables.STYLE + STYLE
    return document(_head(run), style, "\n".join(filter(None, parts)) + video_tables.SCRIPT)


def _head(run: RunFiles) -> Head:
    train, clips = run.config.train, run.clips.get("clips", {})
    count = counted(len(clips) - run.clips.get("held_out", 0), "clip") if clips else "clips"
    summary = f"A LoRA of {run.config.model.name}, trained on {count}."
    summary += " It is finished." if run.step >= train.steps else f" It is at step {run.step} of {train.steps}."
    figures = {"steps": (f"{run.step}", f"of {train.steps}")}
    if losses := run.curve("loss"):
        window = mean_window(losses)
        mean = running_mean(losses, window)[-1][1]
        meaning = f"mean of the last {counted(window, 'step')}" if window > 1 else "of the last step"
        figures["training loss"] = (f"{mean:.3g}", meaning)
    if run.best is not None:
        held_out = all(row.get("held_out") for row in comparable(run.validations))
        whose = "clips that are held out" if held_out else "clips that are trained on"
        figures["best validation loss"] = (f"{run.best[1]:.3g}", f"at step {run.best[0]}, on {whose}")
    if seconds := run.curve("seconds"):
        figures["seconds a step"] = (
            f"{median(s for _, s in seconds[-100:]):.3g}", f"median of the last {min(100, len(seconds))}"
        )  # fmt: skip
        figures["training time"] = (in_words(sum(s for _, s in seconds)), "of all steps, without evaluations")
    if memory := run.curve("memory_gib"):
        figures["GiB of the GPU"] = (f"{max(gib for _, gib in memory):.3g}", "the most that a step took")
    return Head(run.config.name, summary, figures)


def _samples(run: RunFiles) -> str:
    prompts, found = run.config.train.sample_prompts, find_eval_videos(run.run_dir)
    # Rows are keyed by the text of the prompt too, because a later start may have other prompts.
    by_place = {(number, prompt_of(path, number, prompts), step): path for step, number, path in found}
    steps = sorted({step for step, _, _ in found})
    if not steps:
        return ""
    best = run.best[0] if run.best else None
    head = "".join(
        f'<th scope="col"{" class=best" if step == best else ""}>step {step}{" · best" if step == best else ""}</th>'
        for step in steps
    )
    body = ""
    for number, prompt in dict.fromkeys((number, prompt) for number, prompt, _ in sorted(by_place, key=_by_number)):
        cells = "".join(f"<td>{_pair(run.run_dir, by_place.get((number, prompt, step)))}</td>" for step in steps)
        body += f'<tr><th scope="rowgroup" colspan="{len(steps)}"><span>{escape(prompt)}</span></th></tr>'
        body += f"<tr>{cells}</tr>"
    body = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    table = f'<table class="samples" style="--n:{len(steps)}">{body}</table>'
    note = "Every video starts from the same noise. The left half is the base, the right half has that step's LoRA."
    return section("Samples", note, scrollable("Samples", table))


def _by_number(place: tuple[int, str, int]) -> tuple[int, int]:
    number, _, step = place
    return number, step


def _pair(run_dir: Path, path: Path | None) -> str:
    if path is None:
        return ""
    source = quote(path.relative_to(run_dir).as_posix())
    shown = f'<img src="{source}" alt="base and LoRA">'
    if path.suffix != ".png":
        shown = f'<video loop muted playsinline preload="metadata" src="{source}"></video>'
    return f'<div class="pair">{shown}<div><span>base</span><span>LoRA</span></div></div>'


def next_steps(run: RunFiles) -> list[tuple[str, str]]:
    """Returns the next steps with the run: a description and a command for each."""
    conf, commands = f"conf={run.config.run_dir}/config.yaml", []
    if run.step < run.config.train.steps:
        commands.append(("Resume it, if it is not running", ["mochi-tune", "train", conf]))
    adapter = run.run_dir / "adapter.safetensors"
    if not adapter.is_file():
        return [(words, shlex.join(command)) for words, command in commands]
    kept = {step_of(folder): folder for folder in find_checkpoints(run.run_dir / "checkpoints")}
    prompts = run.config.train.sample_prompts
    prompt = f"prompt={prompts[0] if prompts else run.config.sample.prompt or 'a prompt'}"
    best = run.best[0] if run.best else 0
    chosen, whose = Path(run.config.run_dir) / adapter.name, f"the last checkpoint, step {max(kept, default=run.step)}"
    if best in kept:
        name = published_file(kept[best]).relative_to(run.run_dir)
        if best != max(kept):
            chosen, whose = Path(run.config.run_dir) / name, f"the best checkpoint, step {best}"
        else:
            whose = f"the best checkpoint, step {best}, which is the last one"
    commands += [
        (f"Render with {whose}", ["mochi-tune", "sample", conf, f"adapter={chosen}", prompt]),
    ]
    for program, words in (("diffusers", "diffusers"), ("comfyui", "ComfyUI")):
        out = f"out={run.config.name}_{program}.safetensors"
        commands.append((f"Write it for {words}", ["mochi-tune", "export", f"adapter={chosen}", f"to={program}", out]))
    return [(words, shlex.join(command)) for words, command in commands]


def _next_steps(run: RunFiles) -> str:
    commands = "".join(f"<h3>{escape(words)}</h3><pre>{escape(command)}</pre>" for words, command in next_steps(run))
    kept = _kept_steps(run)
    note = "Run the commands in the folder where the training was started."
    if run.best and run.best[0] not in (0, *kept) and kept:
        note += f" The checkpoint of the best step, {run.best[0]}, was not kept; train.keep_best=true keeps it."
    if run.best and run.best[0] == 0 and len(run.validations) > 1:
        note += " No step has a lower validation loss than the start: judge by the samples, or lower the learning rate."
    return section("What to do next", note, commands)


def _kept_steps(run: RunFiles) -> list[int]:
    return [step_of(folder) for folder in find_checkpoints(run.run_dir / "checkpoints")]


def _settings(run: RunFiles) -> str:
    config, train, lora = run.config, run.config.train, run.config.lora
    last = run.starts[-1] if run.starts else {}
    samples = run.steps.most_clips
    buckets = run.clips.get("buckets", {})
    sizes = ", ".join(f"{count} of {size}" for size, count in buckets.items())
    num_clips, held_out = len(run.clips.get("clips", ())), run.clips.get("held_out", 0)
    kind = "".join([" DoRA" if lora.dora else "", " rsLoRA" if lora.rslora else ""])
    resumed = [start["from_step"] for start in run.starts if start.get("from_step")]
    facts = {
        "Clips": f"{num_clips}, {held_out or 'none'} of them held out for validation" if num_clips else "",
        "Sizes": sizes,
        "Cache": config.data.cache,
        "Model": f"{config.model.name}, {config.model.precision or config.model.dtype}",
        "Device": ", ".join(
            filter(None, [last.get("device", ""), _processes(last), f"torch {last['torch']}" if last else ""])
        ),
        "LoRA": f"rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}{kind}",
        "Layers": ", ".join(lora.targets),
        "Optimizer": f"{train.optimizer}, learning rate {train.learning_rate:g}, {train.schedule} after "
        f"{counted(train.warmup_steps, 'step')} of warm-up",
        "A step": f"{samples} sample{'s' * (samples > 1)}" if samples else "",
        "Objective": f"{train.objective}, noise levels {train.sigma_distribution}",
        "Seed": str(config.seed),
        "Started": ", ".join(start["date"] for start in run.starts[:1] if start.get("date")),
        "Resumed from steps": ", ".join(map(str, resumed)),
    }
    listed = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items() if value
    )
    text = escape(run_config_yaml(config).strip())
    everything = f"<details><summary>All settings</summary><pre>{text}</pre></details>"
    listed = f'<dl class="facts">{listed}</dl>'
    return section("Data, model and settings", "What the run is made of.", listed + everything)


def _processes(start: Mapping[str, Any]) -> str:
    count = start.get("processes", 1)
    return f"{count} processes ({start.get('strategy')})" if count > 1 else ""
