"""Real processes for tests: launched as a user of accelerate would."""

import os
import subprocess
import sys


def launch(processes, *arguments, timeout=240):
    """Run ``diffcal ARGUMENTS`` on that many CPU processes; what they print."""
    environment = os.environ | {
        "DIFFCAL_PROGRESS": "0",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={processes}", "-m", "diffcal", *arguments),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
