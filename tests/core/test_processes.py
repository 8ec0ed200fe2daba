"""Processes of a launch wait for each other longer than the backends would let them."""

import contextlib
import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from accelerate import PartialState

from diffcal.core.processes import process_state


def test_the_limit_is_handed_to_the_backend(monkeypatch):
    seen = {}
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def begin(*_, **settings):
        seen.update(settings)
        raise InterruptedError

    monkeypatch.setattr(torch.distributed, "init_process_group", begin)
    PartialState._reset_state()
    try:
        with contextlib.suppress(InterruptedError):
            process_state("cpu")
    finally:
        PartialState._reset_state()
    assert timedelta(days=1) < seen["timeout"] < timedelta(milliseconds=2**31)


SCRIPT = """
import datetime, sys, time
from diffcal.core import processes
processes.PATIENCE = datetime.timedelta(seconds=float(sys.argv[1]))
state = processes.process_state("cpu")
assert state.num_processes == 2
time.sleep(15 * state.process_index)
state.wait_for_everyone()
"""


@pytest.mark.slow
def test_a_barrier_lasts_as_long_as_the_limit(tmp_path):
    # One process comes fifteen seconds late: too late for five seconds' patience.
    (tmp_path / "wait.py").write_text(SCRIPT)
    for limit, works in ((5, False), (7 * 86400, True)):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node=2", str(tmp_path / "wait.py"), str(limit)),
            ],
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert (done.returncode == 0) == works, done.stderr
