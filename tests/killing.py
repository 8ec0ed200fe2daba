"""SIGKILL for tests: a forked copy of the test process, killed when it has come far enough."""

import os
import signal
import time
import warnings


def kill_when(reached, work, timeout=240):
    """Run ``work()`` in a forked process and kill it as soon as ``reached()`` is true.

    Fails if the process ends before. Nothing of the killed process is cleaned up.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of threads that the copy does not have
        child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    deadline = time.monotonic() + timeout
    try:
        while not reached():
            ended, _ = os.waitpid(child, os.WNOHANG)
            assert ended == 0, "it ended before it could be killed"
            assert time.monotonic() < deadline, "it never came that far"
            time.sleep(0.002)
    except BaseException:
        _kill(child)
        raise
    assert os.WIFSIGNALED(_kill(child)), "it ended before it was killed"


def _kill(child):
    try:
        os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1]
    except (ProcessLookupError, ChildProcessError):
        return 0
