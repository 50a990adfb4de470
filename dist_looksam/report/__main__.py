"""`python -m dist_looksam.report RUN_DIR...` draws the pictures of finished or running runs."""

import sys

from dist_looksam.errors import ConfigError
from dist_looksam.report import curves, probe_figures


def main(run_dirs: list[str]) -> int:
    """Print the path of every picture drawn. Exit code 2 where a directory holds no run."""
    if not run_dirs:
        print(__doc__, file=sys.stderr)
        return 2
    for run_dir in run_dirs:
        try:
            print(curves(run_dir))
            for path in probe_figures(run_dir, missing_ok=True):
                print(path)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
