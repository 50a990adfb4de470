"""Train a Vision Transformer with SAM, LookSAM or Look-LayerSAM; `--help` lists the settings."""

import sys

from dist_looksam.fit import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
