"""Torch's threads."""

from threading import Event, Thread

import pytest
import torch

from diffcal.core.devices import one_thread


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def seen_by_a_new_thread():
    seen = []
    thread = Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


@pytest.mark.usefixtures("three_threads")
def test_one_thread_ends_with_what_there_was_even_after_an_error():
    with one_thread():
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
        assert seen_by_a_new_thread() == 1
    assert torch.get_num_threads() == 3
    with pytest.raises(KeyError), one_thread():
        raise KeyError
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_one_thread_of_threads_that_overlap_takes_none_away():
    came, leave, seen = Event(), Event(), []

    def other():
        with one_thread():
            seen.append(torch.get_num_threads())
            came.set()
            leave.wait()
        seen.append(torch.get_num_threads())

    thread = Thread(target=other)
    with one_thread():  # the other comes second and leaves last
        thread.start()
        came.wait()
    assert torch.get_num_threads() == 3
    leave.set()
    thread.join()
    assert seen == [1, 3]
    assert torch.get_num_threads() == 3
    assert seen_by_a_new_thread() == 3
