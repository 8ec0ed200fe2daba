"""Calibration-aware semantic mixing (CSM), from a denoiser to a soft-labelled data set.

    python pipelines/csm.py run --preset digits --out runs/digits
    accelerate launch --num_processes 4 pipelines/csm.py run --preset cifar10 --out runs/cifar10

Reads a checkpoint and real images; writes generated/, annotations/ and dataset/ under ``--out``.
The same as ``diffcal csm``; the method itself is in ``diffcal/workflows/csm.py``.
"""

import sys

from diffcal.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["csm", *sys.argv[1:]]))
