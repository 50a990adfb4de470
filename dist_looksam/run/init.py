"""Write a folder to start from: launch scripts, slurm.sbatch, a hostfile, sites, sweeps, a recipe.

The scripts start the Python that this command runs in. Nothing is overwritten.
"""

import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import project
from ..cli.arguments import Parser
from ..errors import ConfigError

RECIPE = "vit_b16-look_layer_sam-4k"
_PARTS = ("train.py", "launch/*.sh", "launch/slurm.sbatch", "launch/sweeps/*", "cluster/sites/*")
_OF_CHECKOUT = "demo.sh"  # sets up a checkout
_PYTHON = "$project/.venv/bin/python"


def _files(recipe: str) -> dict[Path, Path]:
    """What is written, relative to the new folder: the file that it is a copy of."""
    found = [p for part in _PARTS for p in sorted(project.FOLDER.glob(part))]
    copies = {p.relative_to(project.FOLDER): p for p in found if p.name != _OF_CHECKOUT}
    copies[Path("cluster/hostfile")] = project.FOLDER / "cluster" / "hostfile.example"
    copies[Path("recipe.yaml")] = project.file(f"recipe:{recipe}")
    return copies


def _with_python(text: str) -> str:
    """A script of launch/ that starts this Python where PYTHON is not set."""
    quoted = re.sub(r'([\\"$`}])', r"\\\1", sys.executable)  # it stands in "${PYTHON:-...}"
    return text.replace(_PYTHON, quoted).replace(
        "(default .venv/bin/python)", f"(default {quoted})"
    )


def main(argv: Sequence[str]) -> int:
    """Write the folder. ConfigError, and nothing written, where a file of it is there already."""
    parser = Parser(prog="dist-looksam init", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write into")
    text = f"recipe to copy to DIR/recipe.yaml; default {RECIPE}"
    parser.add_argument("--recipe", default=RECIPE, metavar="NAME", help=text)
    asked = parser.parse_args(list(argv))
    copies = _files(asked.recipe.removeprefix("recipe:"))
    there = [str(path) for path in copies if (asked.folder / path).exists()]
    if there:
        raise ConfigError(
            f"init overwrites nothing, got {asked.folder} with {there[0]}; name another folder, or "
            "move that file away."
        )
    try:
        for path, source in copies.items():
            target = asked.folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            script = source.parent.name == "launch"
            text = source.read_text(encoding="utf-8")
            target.write_text(_with_python(text) if script else text, encoding="utf-8")
            shutil.copymode(source, target)
    except OSError as error:
        raise ConfigError(f"DIR must be a folder to write into, got {error}.") from None
    print(
        f"{len(copies)} files are in {asked.folder}. Edit recipe.yaml (data_dir) and "
        "cluster/hostfile; then, there:\n"
        "  dist-looksam train --config recipe.yaml --dry_run\n"
        "  HOSTFILE=cluster/hostfile launch/deepspeed.sh --config recipe.yaml\n"
        "  sbatch --nodes 8 launch/slurm.sbatch --config recipe.yaml"
    )
    return 0
