"""The `colonnade` command, also as `python -m vfl`."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy loads: idle BLAS threads spin longer than they help

from vfl.cli import main

if __name__ == "__main__":
    main()
