"""JSON lines of all.sh as Markdown, after the intro in `intro.md`.

python tests/gpu/table.py docs/gpu/*.jsonl > docs/gpu/README.md
"""

import json
import sys
from pathlib import Path
from typing import Any

from speed import PROCESSES

Line = dict[str, Any]


def table(heads: list[str], rows: list[list[Any]]) -> str:
    shown = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *shown])


def spread(median_least_most: list[float] | None, digits: int = 3) -> str | None:
    if not median_least_most:
        return None
    middle, *ends = (f"{number:.{digits}f}" for number in median_least_most)
    return f"{middle} ({ends[0]}-{ends[1]})"


def speed(found: list[Line]) -> str:
    heads = ["model", "micro-batch", "compile", "backend", "optimizer", "images/s", "ms a step"]
    heads += ["host ms", "MFU", "peak GiB", "to its base", "to a bare loop", "to plain"]
    rows = []
    for x in (line for line in found if "ms" in line):
        of_turns = [x["ms"], x["ms_least"], x["ms_most"]] if "ms_least" in x else None
        mfu, named = x.get("mfu"), ("model", "micro_batch", "compile", "backend", "optimizer")
        rows.append([
            *(x[name] for name in named),
            f"{x['images_per_s']:,.0f}", spread(of_turns, 2) or x["ms"], x.get("host_ms"),
            f"{mfu:.1%}" if mfu else None, x.get("peak_gib"),
            *(spread(x.get(name)) for name in ("to_base", "to_bare", "to_plain")),
            x.get("first_cycle_s"),
        ])  # fmt: skip
    parts = [table([*heads, "first cycle s"], rows)] if rows else []
    return "\n\n".join(parts + notes([x for x in found if "ms" not in x]) + not_run(found))


def not_run(found: list[Line]) -> list[str]:
    """The rows that all.sh measures on a GPU and that no line tells of."""
    named = ("compile", "model", "micro_batch")
    done = {(*(x[n] for n in named), x["backend"], x["optimizer"]) for x in found if "backend" in x}
    told = [group for x in found for group in (*x.get("skipped", ()), x.get("group", ()))]
    left_out = set(map(tuple, told))
    rows: dict[str, dict[tuple[str, str], None]] = {}
    for group in (g for of_process in PROCESSES for g in of_process):
        missing = [row for row in group[3] if (*group[:3], *row) not in done]
        if missing and group[:3] not in left_out:
            mode, model, images = group[:3]
            rows.setdefault(f"{model}, {images}, {mode}", {}).update(dict.fromkeys(missing))
    said = [f"- {where}: {', '.join(map(' '.join, few))}" for where, few in rows.items()]
    return ["Not yet run:\n\n" + "\n".join(said)] if said else []


def notes(found: list[Line]) -> list[str]:
    """What was not measured, and why."""
    said = [
        "- " + ", ".join(f"{k} {v}" for k, v in line.items() if k not in ("part", "card", "torch"))
        for line in found
    ]
    return ["Not measured:\n\n" + "\n".join(said)] if said else []


def profile(found: list[Line]) -> str:
    done = [x for x in found if "kernels" in x]
    heads = ["compile", "step", "kernels", "kernels' ms", "host ms", "ms", "longest (count, ms)"]
    rows = [
        [
            x["compile"], x["step"], x["kernels"], x.get("kernel_ms"), x["host_ms"], x["ms"],
            "; ".join(f"`{n[:40]}` {count}, {ms}" for n, count, ms in x.get("top", [])[:5]),
        ]
        for x in done
    ]  # fmt: skip
    parts = [table(heads, rows)] if rows else []
    return "\n\n".join(parts + notes([x for x in found if "kernels" not in x]))


def correct(found: list[Line]) -> str:
    files: dict[str, dict[str, int]] = {}
    unfinished = notes([x for x in found if "test" not in x])
    found = [x for x in found if "test" in x]
    for line in found:
        counts = files.setdefault(line["test"].split("::")[0].split(" ")[0], {})
        counts[line["outcome"]] = counts.get(line["outcome"], 0) + 1
    outcomes = ["passed", "failed", "skipped", "missing", "cut off"]
    rows = [[f"`{f}`", *(counts.get(o, 0) for o in outcomes)] for f, counts in files.items()]
    told = [
        f"- {x['outcome']}: `{x['test']}`: {' '.join(x.get('why', '').split())[-300:]}"
        for x in found
        if x["outcome"] in ("failed", "cut off")
    ]
    counted = [table(["tests", *outcomes], rows)] if rows else []
    return "\n\n".join([*counted, *(["\n".join(told)] if told else []), *unfinished])


def optimizer(found: list[Line]) -> str:
    heads = ["work", "ms", "host ms", "GB/s"]
    return table(heads, [[x["work"], x["ms"], x["host_ms"], x["gb_per_s"]] for x in found])


def section(path: Path) -> str:
    """Where it was measured, with which command, then its parts."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    run = next((x for x in found if x["part"] == "run"), {})
    on = f"{run.get('card', '-')}, torch {run.get('torch', '-')}, commit {run.get('commit', '-')}"
    told = [f"## {path.stem}: {on}", f"{run.get('date', '-')}: `{run.get('command', '-')}`"]
    for title, part, make in (
        ("Speed", "speed", speed), ("Profile", "profile", profile),
        ("Optimizer alone", "optimizer", optimizer), ("Correctness", "correct", correct),
    ):  # fmt: skip
        own = [x for x in found if x["part"] == part]
        told += [f"### {title}", make(own) if own else "Not yet run."]
    return "\n\n".join(told)


def text_of(paths: list[Path]) -> str:
    """The page: the intro, then a section for each file, the newest name first."""
    intro = Path(__file__).with_name("intro.md").read_text(encoding="utf-8").strip()
    newest = sorted(paths, reverse=True)
    return "\n\n".join([intro, *map(section, newest)]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text_of([Path(name) for name in sys.argv[1:]]))
