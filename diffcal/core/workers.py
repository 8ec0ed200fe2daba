"""Work on many pieces by several threads, for code that lets go of the interpreter."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

__all__ = ["share_out"]


def share_out(starts: range, workers: int, work: Callable[[Iterator[int]], None]) -> None:
    """Have ``work`` take all starts, each once, on this thread and on ``workers - 1`` others at once.

    Results that do not depend on who takes which start are then the same for any number of workers.
    With one worker, or none, no thread is started.

    Args:
        starts: Where the pieces begin.
        workers: At most as many as there are pieces are at work.
        work: Called once by every worker with the starts that it gets, one by one. What it raises is
            raised here, when all have ended.
    """
    workers = min(workers, len(starts))
    if workers <= 1:
        work(iter(starts))
        return
    left = deque(starts)

    def remaining() -> Iterator[int]:
        with suppress(IndexError):  # whoever comes first gets it
            while True:
                yield left.popleft()

    with ThreadPoolExecutor(workers - 1) as pool:
        others = [pool.submit(work, remaining()) for _ in range(workers - 1)]
        work(remaining())
        for other in others:
            other.result()
