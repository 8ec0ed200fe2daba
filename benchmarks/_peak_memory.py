"""Memory that a piece of work needs; shared by the scripts of this folder (Linux)."""

import resource
import threading
from pathlib import Path


class PeakMemory:
    """Largest resident set while inside, sampled every two milliseconds."""

    def __enter__(self) -> "PeakMemory":
        self.start = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
