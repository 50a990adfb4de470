"""A look and a step between looks under torch's profiler: kernels, launches, the host's time."""

import gzip
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lines
import torch
import trained
from lines import ON_GPU, OUT
from torch.profiler import ProfilerActivity, profile
from trained import K

MODEL, IMAGES, OPTIMIZER = "vit_b16", 128, "look_layer_sam"
BANDWIDTH = Path(__file__).with_name("test_kernel_speed.py")
MOST = 15 * 2**20  # bytes of a trace that is kept
MODES = ("blocks", "off") if ON_GPU else ("blocks",)


def kernels_of(made: Any) -> tuple[Counter, Counter]:
    """(count, microseconds) by name; on a CPU of operators."""
    counts: Counter = Counter()
    times: Counter = Counter()
    for event in made.profiler.kineto_results.events():
        name = event.name()
        if is_kernel(event, name) if ON_GPU else name.startswith("aten::"):
            counts[name] += 1
            times[name] += event.duration_ns() / 1e3
    return counts, times


_SPANS = ("Optimizer.", "ProfilerStep", "Torch-Compiled", "## Call", "CompiledFunction", "AOT")


def is_kernel(event: Any, name: str) -> bool:
    """Of the device, and no span that torch's own annotations draw over kernels."""
    if "CUDA" not in str(event.device_type()):
        return False
    annotates = getattr(event, "is_user_annotation", lambda: False)()
    return not (annotates or name.startswith(_SPANS))


def profiled(mode: str) -> dict[str, list]:
    """Write the lines of a mode; returns the longest kernels of a step between looks."""
    images = IMAGES if ON_GPU else 4
    engine = trained.engine_of("plain", OPTIMIZER, MODEL, images, mode)
    batch = trained.batch_of(images)
    for _ in range(2 * K):
        engine.step([batch])
    found = {}
    for name, before in (("look", 0), ("between", 1)):  # a look is due; then the second after it
        for _ in range(before):
            engine.step([batch])
        host, seconds = timed(engine, batch, before)
        with profile(activities=activities()) as made:
            looked = engine.step([batch]).look
            synchronise()
        assert looked == (name == "look")
        counts, times = kernels_of(made)
        top = [[n[:90], counts[n], round(t / 1e3, 3)] for n, t in times.most_common(25)]
        lines.write(
            "profile",
            step=name,
            compile=mode,
            model=MODEL,
            micro_batch=images,
            optimizer=OPTIMIZER,
            kernels=sum(counts.values()),
            kernel_ms=round(sum(times.values()) / 1e3, 2),
            host_ms=round(1e3 * host, 2),
            ms=round(1e3 * seconds, 2),
            top=top,
        )
        found[name] = top
        keep(made, OUT / f"trace-{mode}-{name}.json.gz")
    return found


def timed(engine: Any, batch: Any, place: int) -> tuple[float, float]:
    """(host's, whole) seconds of the step of this place in a cycle, without the profiler; then
    goes on to the same place."""
    synchronise()
    began = time.perf_counter()
    engine.step([batch])
    host = time.perf_counter() - began
    synchronise()
    seconds = time.perf_counter() - began
    for _ in range(K - 1):
        engine.step([batch])
    synchronise()
    return host, seconds


def activities() -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]


def synchronise() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def keep(made: Any, path: Path) -> None:
    """The Chrome trace, compressed, unless it is large."""
    plain = path.with_suffix("")
    made.export_chrome_trace(str(plain))
    with plain.open("rb") as source, gzip.open(path, "wb", compresslevel=6) as target:
        shutil.copyfileobj(source, target)
    plain.unlink()
    if path.stat().st_size > MOST:
        path.unlink()


def draw(found: dict[str, dict[str, list]]) -> None:
    """profile.png: the longest kernels of each mode's step between looks, and of its look."""
    try:
        import matplotlib
    except ImportError:
        lines.write("profile", missing="matplotlib: no picture")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pairs = [(mode, step) for mode in found for step in found[mode]]
    figure, axes = pyplot.subplots(len(pairs), 1, figsize=(11, 4 * len(pairs)), squeeze=False)
    for (mode, step), axis in zip(pairs, axes[:, 0], strict=True):
        top = found[mode][step][:12][::-1]
        axis.barh([f"{n[:60]} ({count} x)" for n, count, _ in top], [ms for *_, ms in top])
        axis.set_xlabel("ms a step")
        axis.set_title(f"{MODEL}, {OPTIMIZER}, compile {mode}, {step}")
        axis.tick_params(axis="y", labelsize=7)
    figure.tight_layout()
    figure.savefig(OUT / "profile.png", dpi=80)


def main() -> int:
    found, failed = {}, 0
    for mode in MODES:
        if lines.left() < 12:
            lines.write("profile", compile=mode, why="no time was left")
            continue
        try:
            found[mode] = profiled(mode)
        except Exception as error:
            failed = 1
            lines.write("profile", compile=mode, error=lines.reason(error))
    if found:
        draw(found)
    return failed or (bandwidth() if ON_GPU else 0)


def bandwidth() -> int:
    """The optimizer's own kernels, with nothing beside them: lines of test_kernel_speed.py."""
    if lines.left() < 20:
        lines.write("profile", skipped="test_kernel_speed.py", why="no time was left")
        return 0
    torch.cuda.empty_cache()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(BANDWIDTH)]
    try:
        return subprocess.run(command, timeout=lines.left() - 2, check=False).returncode
    except subprocess.TimeoutExpired:
        lines.write("profile", skipped="test_kernel_speed.py", why="cut off: no time was left")
        return 0


if __name__ == "__main__":
    sys.exit(main())
