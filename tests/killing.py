"""SIGKILL for tests: a forked copy of the test process, killed when it has come far enough."""

import fnmatch
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


def kill_at_rename(pattern, work, *, renamed):
    """Run ``work()`` in a forked process that is killed where a file of this name takes its place.

    Every artefact is written beside its place and renamed. The kill comes at the first file whose path
    matches ``pattern``: right before the rename, or right after it if ``renamed``. Fails if there is
    none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        real = os.replace

        def replace(source, target):
            mine = fnmatch.fnmatch(str(target), pattern)
            if mine and not renamed:
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace
        try:
            work()
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status), f"it ended before '{pattern}' was written"
    assert os.WTERMSIG(status) == signal.SIGKILL
