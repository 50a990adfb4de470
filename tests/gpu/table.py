"""JSON lines of all.sh as Markdown: `table.py LINES.jsonl ... > README.md`."""

import json
import sys
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def table(heads: list[str], rows: list[list[Any]]) -> str:
    shown = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *shown])


def spread(ratio: list[float] | None) -> str | None:
    return f"{ratio[0]:.3f} ({ratio[1]:.3f}-{ratio[2]:.3f})" if ratio else None


def speed(found: list[Line]) -> str:
    rows = [
        [
            x["model"], x["micro_batch"], x["compile"], x["backend"], x["optimizer"],
            f"{x['images_per_s']:,.0f}", f"{x['ms']:.2f} ({x['ms_least']:.2f}-{x['ms_most']:.2f})",
            f"{x['host_ms']:.1f}", x["mfu"] and f"{x['mfu']:.1%}", x["peak_gib"],
            spread(x.get("to_base")), spread(x.get("to_bare")), spread(x.get("to_plain")),
            f"{x['first_cycle_s']:.1f}",
        ]
        for x in found
        if "ms" in x
    ]  # fmt: skip
    heads = ["model", "micro-batch", "compile", "backend", "optimizer", "images/s", "ms a step"]
    heads += ["host ms", "MFU", "peak GiB", "to its base", "to bare AdamW", "to plain"]
    parts = [table([*heads, "first cycle s"], rows)] if rows else []
    return "\n\n".join(parts + notes([x for x in found if "ms" not in x]))


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
            x["compile"], x["step"], x["kernels"], x["kernel_ms"], x["host_ms"], x["ms"],
            "; ".join(f"`{n[:40]}` {count}, {ms}" for n, count, ms in x["top"][:5]),
        ]
        for x in done
    ]  # fmt: skip
    parts = [table(heads, rows)] if rows else []
    return "\n\n".join(parts + notes([x for x in found if "kernels" not in x]))


def correct(found: list[Line]) -> str:
    files: dict[str, dict[str, int]] = {}
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
    return "\n\n".join([table(["tests", *outcomes], rows), *(["\n".join(told)] if told else [])])


def text_of(paths: list[Path]) -> str:
    """A section for each file: where it was measured, then its parts."""
    sections = []
    for path in paths:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        on = next((x for x in found if "card" in x), {})
        what = (
            f"{on.get('card', '-')}, torch {on.get('torch', '-')}, commit {on.get('commit', '-')}"
        )
        sections.append(f"## {path.stem}: {what}")
        for title, part, make in (
            ("Speed", "speed", speed), ("Profile", "profile", profile),
            ("Correctness", "correct", correct),
        ):  # fmt: skip
            own = [x for x in found if x["part"] == part]
            if own:
                sections += [f"### {title}", make(own)]
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text_of([Path(name) for name in sys.argv[1:]]))
