"""Pieces shared among threads."""

import threading

import pytest

from diffcal.core.workers import share_out


@pytest.mark.parametrize("workers", [-1, 0, 1, 2, 3, 50])
@pytest.mark.parametrize("count", [0, 1, 2, 17])
def test_every_start_is_taken_once(workers, count):
    taken = []
    share_out(range(0, 5 * count, 5), workers, taken.extend)
    assert sorted(taken) == list(range(0, 5 * count, 5))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_as_many_threads_as_workers(workers):
    everyone = threading.Barrier(workers, timeout=60)  # passes when all of them wait
    threads = []

    def work(starts):
        next(starts)
        everyone.wait()
        threads.append(threading.current_thread())

    share_out(range(workers), workers, work)
    assert len(set(threads)) == workers
    assert threading.current_thread() in threads


def test_what_another_thread_raises_is_raised():
    here, other_began = threading.current_thread(), threading.Event()

    def work(starts):
        for start in starts:
            if threading.current_thread() is not here:
                other_began.set()
                raise RuntimeError(f"piece {start}")
            assert other_began.wait(60)

    with pytest.raises(RuntimeError, match=r"piece \d+"):
        share_out(range(9), 2, work)


def test_what_this_thread_raises_is_raised():
    here, began = threading.current_thread(), threading.Event()
    taken = []

    def work(starts):
        for start in starts:
            if threading.current_thread() is here:
                began.set()
                raise RuntimeError("here")
            assert began.wait(60)
            taken.append(start)

    with pytest.raises(RuntimeError, match="here"):
        share_out(range(9), 2, work)
    assert len(taken) == 8  # the others went on
