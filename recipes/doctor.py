"""Checks whether this machine can fine-tune. Downloads nothing and reads only the headers of the weights."""

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

# The modules of each extra, and what it is for.
EXTRAS = {
    "bitsandbytes": (("bitsandbytes",), "train.optimizer=adamw_8bit"),
    "trackio": (("trackio",), "log.trackio=true"),
    "footage": (("scenedetect",), "split"),
    "ray": (("ray",), "parallel.engine=ray"),
    "ui": (("gradio", "uvicorn"), "ui"),
}
DECODERS = ("h264", "hevc", "vp9", "av1", "prores", "mjpeg")
GIB = 2**30
# Minimum free space for a run, and size of the smallest official weights.
LEAST_FREE_GIB, WEIGHTS_GIB = 2, 16
# T5-XXL in bf16 and the rest of the process.
LEAST_MEMORY_GIB = 12
# fp32 rounds by 6e-8, and a sum of some hundred products by a few times as much.
TOLERANCE = 2e-5
OK, NOTE, FAIL = "ok", "note", "FAIL"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: name of the check.
        says: what was found.
        advice: what to do; "" for nothing.
        verdict: OK; NOTE if something is missing that only some runs need; FAIL if a run would fail.
    """

    name: str
    says: str
    advice: str = ""
    verdict: str = OK


def main(weights: Path, device: str) -> Iterator[Finding]:
    """Runs the checks; yields the result of each.

    Args:
        weights: folder of the weights, which need not exist.
        device: device of the self-test: "cpu", "cuda" or "auto".

    Raises:
        ConfigError: there is no such device.
    """
    yield check_python(sys.version_info[:3])
    torch_finding = check_torch()
    yield torch_finding
    yield check_packages()
    if torch_finding.verdict != FAIL:
        yield from check_gpus()
        yield check_attention()
        yield check_kernels()
    yield check_memory()
    yield check_disk(Path.cwd(), weights)
    yield check_video()
    yield check_extras()
    if torch_finding.verdict != FAIL:
        yield check_weights_at(weights)
        yield check_numbers(device)


def check_python(version: tuple[int, ...]) -> Finding:
    """Checks the version of Python."""
    says = ".".join(map(str, version)) + f", {platform.system()} {platform.machine()}"
    needed = SpecifierSet(metadata("mochi-tune")["Requires-Python"])
    if ".".join(map(str, version)) in needed:
        return Finding("Python", says)
    return Finding("Python", says, f"install Python {needed}", FAIL)


def check_torch() -> Finding:
    """Checks the version of torch, and that it supports CUDA if there is a GPU."""
    try:
        import torch
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        return Finding("torch", f"cannot be imported: {reason}", "pip install --force-reinstall torch", FAIL)
    says = f"{torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA")
    if not _requirements()["torch"].contains(torch.__version__, prereleases=True):
        return Finding("torch", says, "pip install --upgrade torch", FAIL)
    if has_nvidia_driver() and not torch.cuda.is_available():
        advice = "the driver is too old for it, or the GPU is hidden: compare `nvidia-smi` with pytorch.org/get-started"
        if not torch.version.cuda:
            advice = "this torch uses no GPU, and there is one: install torch for CUDA, see pytorch.org/get-started"
        return Finding("torch", says, advice, FAIL)
    return Finding("torch", says)


def check_packages() -> Finding:
    """Checks that every package that mochi-tune requires is installed, in a version that it works with."""
    wrong, install = [], []
    for name, needed in _requirements().items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = ""
        if not found or not needed.contains(found, prereleases=True):
            wrong.append(f"{name} {found}, needed is {needed}" if found else f"{name} is not installed")
            install.append(f"'{name}{needed}'")
    if not wrong:
        return Finding("packages", "all that are required")
    return Finding("packages", "; ".join(wrong), f"pip install {' '.join(install)}", FAIL)


def _requirements() -> dict[str, SpecifierSet]:
    """Returns the versions of the packages that mochi-tune requires here, without its extras."""
    needed = map(Requirement, requires("mochi-tune") or ())
    return {each.name: each.specifier for each in needed if not each.marker or each.marker.evaluate({"extra": ""})}


def has_nvidia_driver() -> bool:
    """Whether the machine has an NVIDIA driver; a torch without CUDA cannot tell."""
    return Path("/proc/driver/nvidia/version").exists()


def check_gpus() -> Iterator[Finding]:
    """Checks each GPU and its free memory."""
    import torch

    if not torch.cuda.is_available():
        yield Finding("GPU", "none", "Mochi 1 needs a CUDA GPU; `demo`, model=toy and model=tiny do not", NOTE)
        return
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        free, total = (each / GIB for each in torch.cuda.mem_get_info(number))
        says = f"{facts.name}, {total:.1f} GiB, {free:.1f} free, compute capability {facts.major}.{facts.minor}"
        if free < total / 2:
            yield Finding(f"GPU {number}", says, "another program holds its memory: see `nvidia-smi`", NOTE)
        else:
            yield Finding(f"GPU {number}", says)


def check_attention() -> Finding:
    """Checks which attention kernels run on the GPU at the width of Mochi's heads."""
    import torch

    from mochi_tune.parallel.kernels import time_attention

    if not torch.cuda.is_available():
        return Finding("attention", "PyTorch's own, on the CPU")
    seconds = time_attention((24, 2048, 128), torch.device("cuda"), torch.bfloat16)
    if not seconds:
        advice = "training is slow and takes much memory without one: update torch and the driver"
        return Finding("attention", "no fused kernel runs here", advice, FAIL)
    fastest_first = sorted(seconds, key=lambda name: seconds[name])
    return Finding("attention", ", ".join(f"{name} {1000 * seconds[name]:.2g} ms" for name in fastest_first))


def check_kernels() -> Finding:
    """Checks that Triton launches kernels on the GPU, for which it compiles C code."""
    import torch

    from mochi_tune.models.device import TRITON_NEEDS, triton_fault

    if not torch.cuda.is_available():
        return Finding("kernels", "PyTorch's own, on the CPU")
    if fault := triton_fault(torch.device("cuda")):
        advice = f"install {TRITON_NEEDS}; without them `prepare` and `sample` are slower, and nothing is compiled"
        return Finding("kernels", f"Triton's do not run here: {fault}", advice, NOTE)
    return Finding("kernels", "Triton's run here")


def check_memory() -> Finding:
    """Checks the host memory."""
    import psutil

    memory = psutil.virtual_memory()
    says = f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} available"
    if memory.available < LEAST_MEMORY_GIB * GIB:
        advice = f"`prepare` and `sample` of Mochi 1 read T5 through it: close programs, or use {LEAST_MEMORY_GIB} GiB"
        return Finding("memory", says, advice, NOTE)
    return Finding("memory", says)


def check_disk(folder: Path, weights: Path) -> Finding:
    """Checks that this folder, for the runs, and the folder of the weights have free space and are writable."""
    here, there = (shutil.disk_usage(_existing(path)).free / GIB for path in (folder, weights))
    says = f"{here:.1f} GiB free here, {there:.1f} at {weights}"
    if not os.access(folder, os.W_OK):
        return Finding("disk", f"{says}; {folder} cannot be written to", "work in another folder", FAIL)
    if here < LEAST_FREE_GIB:
        return Finding("disk", says, f"a run needs {LEAST_FREE_GIB} GiB: free some, or work in another folder", FAIL)
    # Existing weights may be on a read-only disk.
    if not weights.exists() and not os.access(_existing(weights), os.W_OK):
        advice = "`weights pull to=DIR` elsewhere"
        return Finding("disk", f"{says}; {_existing(weights)} cannot be written to", advice, NOTE)
    if not weights.exists() and there < WEIGHTS_GIB:
        return Finding("disk", says, f"the weights take {WEIGHTS_GIB} to 61 GiB: `weights pull to=DIR` elsewhere", NOTE)
    return Finding("disk", says)


def _existing(path: Path) -> Path:
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def check_video() -> Finding:
    """Checks PyAV and the codecs of its FFmpeg."""
    try:
        import av
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        return Finding("video", f"PyAV cannot be imported: {reason}", "pip install --force-reinstall av", FAIL)
    from mochi_tune.sampling.formats import CODECS

    says = f"PyAV {av.__version__}"
    wanted = [(codec.encoder, "w") for codec in CODECS.values()] + [(name, "r") for name in DECODERS]
    missing = [f"{name} ({'written' if mode == 'w' else 'read'})" for name, mode in wanted if not _has(name, mode)]
    if not missing:
        written, read = (", ".join(name for name, mode in wanted if mode == each) for each in "wr")
        return Finding("video", f"{says}: writes {written}; reads {read}")
    advice = "take PyAV's own wheel: pip install --only-binary av --force-reinstall av"
    verdict = FAIL if any(name.startswith(("libx264", "h264")) for name in missing) else NOTE
    return Finding("video", f"{says} lacks {', '.join(missing)}", advice, verdict)


def _has(name: str, mode: str) -> bool:
    from av.codec import Codec
    from av.codec.codec import UnknownCodecError

    try:
        Codec(name, "w" if mode == "w" else "r")
    except UnknownCodecError:
        return False
    return True


def check_extras() -> Finding:
    """Checks the extras of the package by importing them: some need system libraries, too."""
    lacking = [extra for extra, (modules, _) in EXTRAS.items() if not all(map(importlib.util.find_spec, modules))]
    there = [extra for extra in EXTRAS if extra not in lacking]
    says = f"installed: {', '.join(there) or 'none'}"
    for name, modules, use in ((name, *EXTRAS[name]) for name in there):
        try:
            for module in modules:
                importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - other packages raise anything where the system lacks a library
            reason = f"{name} cannot be imported: {' '.join(str(error).split())[:200]}"
            return Finding("extras", f"{says}; {reason}", f"repair it before you use {use}", NOTE)
    if not lacking:
        return Finding("extras", says)
    wanted = "; ".join(f"{extra} for {EXTRAS[extra][1]}" for extra in lacking)
    return Finding("extras", says, f"if wanted, pip install 'mochi-tune[EXTRA]': {wanted}", NOTE)


def check_weights_at(weights: Path) -> Finding:
    """Checks the weights by the headers of their files."""
    from mochi_tune.weights.check import check_weights
    from mochi_tune.weights.folder import WeightsFolder

    if not weights.exists():
        advice = "`mochi-tune weights pull` fetches them; `demo` and model=toy need none"
        return Finding("weights", f"none in {weights}", advice, NOTE)
    report = check_weights(WeightsFolder(weights))
    says = f"{weights}: {'; '.join(report.verbs)}"
    if report.is_complete:
        return Finding("weights", says)
    return Finding("weights", says, "`mochi-tune weights check` says what is wrong with each part", FAIL)


def check_numbers(device: str) -> Finding:
    """Compares the embedded tiny DiT in fp32 on the device with fp64 on the CPU."""
    import torch

    from mochi_tune import assets
    from mochi_tune.models.device import find_device
    from mochi_tune.weights.folder import WeightsFolder

    chosen, folder = find_device(device), WeightsFolder(assets.FOLDER / "tiny")
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 12, 3, 8, 12, generator=generator)
    prompt, mask = torch.randn(1, 16, 64, generator=generator), torch.ones(1, 16, dtype=torch.uint8)
    sigma = torch.tensor([0.7])
    with torch.no_grad():
        exact = folder.load_dit("cpu", torch.float32).double()(latents.double(), sigma.double(), prompt.double(), mask)
        try:
            dit = folder.load_dit(chosen, torch.float32)
            got = dit(*(each.to(chosen) for each in (latents, sigma, prompt, mask))).cpu().double()
        except Exception as fault:  # noqa: BLE001 - drivers and compilers raise anything
            reason = " ".join(f"{type(fault).__name__}: {fault}".split())[:200]
            says = f"the tiny DiT does not run on {chosen.type}: {reason}"
            return Finding("numbers", says, "update torch and the driver, for this GPU", FAIL)
    error = ((got - exact).abs().max() / exact.abs().max()).item()
    says = f"the tiny DiT in fp32 on {chosen.type} is within {error:.1e} of fp64; allowed is {TOLERANCE:.0e}"
    # A NaN is not within the tolerance.
    if error <= TOLERANCE:
        return Finding("numbers", says)
    return Finding("numbers", says, "`mochi-tune verify` says which part is wrong; update torch and the driver", FAIL)
