"""Train a Vision Transformer with SAM, LookSAM or Look-LayerSAM; `--help` lists the settings."""

import faulthandler
import sys

try:
    from dist_looksam.cli.leave import leave
    from dist_looksam.run.train import main
except KeyboardInterrupt:  # importing torch takes seconds
    sys.exit(130)

if __name__ == "__main__":
    faulthandler.enable()  # a crash in a library says where Python was, on every rank
    leave(main(sys.argv[1:]))
