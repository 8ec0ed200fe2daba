"""Proof that nothing ran: an audit hook that records what an unpickler could be made to do.

Python tells audit hooks about every import, compilation, execution of code objects and start of a
process, whoever causes it. A hook cannot be removed, so this one listens only inside
:func:`recorded`.
"""

import contextlib
import os
import sys

# Written out in full rather than by prefix: what the recorder misses, the tests would not see.
_EVENTS = {
    "compile",
    "ctypes.dlopen",
    "exec",
    "import",
    "marshal.loads",
    "os.exec",
    "os.fork",
    "os.mkdir",
    "os.posix_spawn",
    "os.putenv",
    "os.remove",
    "os.rename",
    "os.spawn",
    "os.system",
    "pickle.find_class",
    "shutil.rmtree",
    "socket.connect",
    "subprocess.Popen",
}
# The tests' own type checker compiles its checks when a function is first called.
_CHECKERS = (f"{os.sep}beartype{os.sep}", f"{os.sep}jaxtyping{os.sep}")
_records = None


def _hook(event, arguments):
    if _records is not None and (
        event in _EVENTS or (event == "open" and "w" in str(arguments[1] or ""))
    ):
        frame = sys._getframe(1)
        if not any(part in frame.f_code.co_filename for part in _CHECKERS):
            _records.append((event, str(arguments[0])[:80] if arguments else ""))


sys.addaudithook(_hook)


@contextlib.contextmanager
def recorded():
    """List of what happens inside the block."""
    global _records
    _records = seen = []
    try:
        yield seen
    finally:
        _records = None


@contextlib.contextmanager
def nothing_runs():
    """Fail if anything is imported, compiled, executed, started or written inside the block."""
    error = None
    with recorded() as seen:
        try:
            yield
        except Exception as caught:  # raised again below, once the recorder is off
            error = caught
    assert not seen, f"something ran: {seen[:5]}"
    if error is not None:
        raise error
