"""Compares the speed of decoding in this working tree with that of another commit.

    python tests/data/decode_ratio.py COMMIT [ROUNDS] [DIR]

Of the pictures of make_set.py (in DIR, if they are there already), crop and flip at 224 pixels, as
`TrainLoader` gives them with one thread: processor time of a process, one process for each route.
They take turns of 256 pictures in random order, so that other load meets all alike; three
turns of each are a round. Prints images/s a core and the ratios of rounds: the median, the least
and the most. Needs the C extension in this tree (python setup.py build_ext --inplace).
"""

import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from random import Random
from statistics import median
from time import process_time

ROOT = Path(__file__).parents[2]
BATCH, TURNS = 256, 3
PICTURES = 600


def serve(folder: str) -> None:
    """Answers each line with the seconds of a batch."""
    import torch

    from dist_looksam.data import TrainLoader, load

    torch.set_num_threads(1)
    train = load("folder", folder, image_size=224, augment="crop,flip").train
    how = {"seed": 0, "batch_size": BATCH, "micro_batch": BATCH, "rank": 0, "ranks": 1}
    loader = TrainLoader(train, **how, workers=1, prefetch=0, pin=False)
    for step, _ in enumerate(sys.stdin):
        began = process_time()
        loader.step(step)
        print(process_time() - began, flush=True)
    loader.close()


@contextmanager
def tree_of(commit: str):
    """A folder with the files of a commit, and its C extension if it has one."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            if (tree / "dist_looksam/data/jpeg.c").exists():
                build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
                subprocess.run(build, cwd=tree, check=True, stderr=subprocess.DEVNULL)
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def routes_of(name: str, tree: Path, folder: str) -> dict[str, subprocess.Popen]:
    """The processes of a tree: its C route where it is built, and its Python route."""
    found = {}
    for route in ("C", "Python"):
        if route == "Python" or [*tree.glob("dist_looksam/data/_jpeg*.so")]:
            own = {"DIST_LOOKSAM_JPEG": "python"} if route == "Python" else {}
            found[f"{name} {route}"] = subprocess.Popen(
                [sys.executable, __file__, "--serve", folder],
                env={**os.environ, **own, "PYTHONPATH": str(tree)},
                cwd=tree,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
    return found


def measured(routes: dict[str, subprocess.Popen], rounds: int) -> dict[str, list[float]]:
    """Seconds of each route in each round, of a batch; the first round is not counted."""
    seconds = {name: [0.0] * (rounds + 1) for name in routes}
    random = Random(0)
    for turn in range((rounds + 1) * TURNS):
        for name in random.sample([*routes], len(routes)):
            pipe = routes[name]
            assert pipe.stdin and pipe.stdout
            pipe.stdin.write("\n")
            pipe.stdin.flush()
            seconds[name][turn // TURNS] += float(pipe.stdout.readline()) / TURNS
    return {name: times[1:] for name, times in seconds.items()}


def spread(numbers: list[float], form: str) -> str:
    """The median (least-most)."""
    middle, least, most = (format(f(numbers), form) for f in (median, min, max))
    return f"{middle} ({least}-{most})"


def main(commit: str, rounds: int = 12, folder: str = "") -> None:
    with tempfile.TemporaryDirectory() as scratch, tree_of(commit) as tree:
        if not folder:
            from make_set import make

            make(Path(folder := scratch), PICTURES)
        routes = {**routes_of(commit, tree, folder), **routes_of("this", ROOT, folder)}
        try:
            seconds = measured(routes, rounds)
        finally:
            for process in routes.values():
                process.kill()
                process.wait()
    for name, times in seconds.items():
        print(f"{name:<20} {spread([BATCH / t for t in times], '.0f')} images/s a core")
    for name, times in seconds.items():
        for other in [n for n in seconds if name.startswith("this") and n.startswith(commit)]:
            ratios = [a / b for a, b in zip(seconds[other], times, strict=True)]
            print(f"{name} / {other}: {spread(ratios, '.2f')}")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    else:
        main(sys.argv[1], *map(int, sys.argv[2:3]), *sys.argv[3:4])
