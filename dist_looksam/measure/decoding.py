"""dist-looksam data bench: what a core decodes, and how many cores a node needs for a plan."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..data import bench, loader
from ..data.pictures import Pictures
from ..errors import ConfigError
from ..plan import Plan, machine, machines
from ..plan.commands import of_flags
from ..plan.reading import reading


def main(flags: argparse.Namespace, plan_flags: Sequence[str], data: str, source: Pictures) -> int:
    """Measure `source`, the training split of the data set `data`, and print what was found.

    plan_flags: of `dist-looksam plan`, for the images/s that a node needs; may be empty.
    Raises ConfigError, before anything is measured, and RunError.
    """
    bench.check(flags)
    planned = _planned(flags, plan_flags, data, source) if plan_flags else None
    made = _machine(flags, planned) if flags.write else None
    speeds = bench.run(flags, source)
    images = flags.images_per_s
    if planned is not None and (reads := reading(planned)):
        images = reads.images_per_s
    bench.show(flags, speeds, bench.needed(speeds, images) if images else None)
    if made is not None:
        speed = next(iter(speeds.values())).images_per_s
        cores = loader.cores()
        made = replace(made, images_per_second_per_core=round(speed, 1), cores_per_node=cores)
        machines.save(made, Path(flags.write), "write")
        gpu = f"{made.device.name} and {made.network.name}"
        print(f"{flags.write}: {speed:,.0f} images/s a core, {cores} cores a node, beside {gpu}; "
              f"{machines.FILE}={flags.write} gives them to plan, dry runs and recipes",
              file=sys.stderr)  # fmt: skip
    return 0


def _planned(
    flags: argparse.Namespace, plan_flags: Sequence[str], data: str, source: Pictures
) -> Plan:
    if flags.images_per_s is not None:
        raise ConfigError(
            f"images_per_s is of the plan where there are flags of one, got --images_per_s "
            f"{flags.images_per_s:g} and {plan_flags[0]}; leave one out."
        )
    own = ["--data", data, "--data_dir", flags.source, "--augment", flags.augment]
    own += ["--image_size", str(flags.image_size), "--classes", str(len(source.class_names))]
    own += ["--augment_on", flags.augment_on, "--samples", str(len(source))]
    return of_flags([*own, *plan_flags])


def _machine(flags: argparse.Namespace, planned: Plan | None) -> machines.Machine:
    """What the file holds; where there is none, the machine of the plan, which is written."""
    if Path(flags.write).exists():
        return machines.load(Path(flags.write))
    made = machine() if planned is None else planned.machine
    machines.save(made, Path(flags.write), "write")  # else it might fail after the measurement
    return made
