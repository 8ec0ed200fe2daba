"""Diffusion attribution scores (DAS): which training images a generated image owes itself to.

    python pipelines/das.py index --preset digits --out runs/das
    python pipelines/das.py score --index runs/das --queries runs/csm/generated --top 20
    python pipelines/das.py counterfactual --preset digits --out runs/counterfactual
    accelerate launch --num_processes 4 pipelines/das.py index --preset digits --out runs/das

``index`` reads a checkpoint and its training images and writes their features; ``score`` writes
scores.parquet and gallery.html; ``counterfactual`` retrains without the images on top and compares. The
same as ``diffcal das``; see ``diffcal/workflows/das.py``.
"""

import sys

from diffcal.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["das", *sys.argv[1:]]))
