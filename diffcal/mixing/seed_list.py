"""Lists of seeds as EDM's and CSM's published commands write them: ``0-63``, ``d8,0-19979``, ``4x3``."""

import re

from diffcal.errors import ConfigError

__all__ = ["parse_seed_list"]

_PART = re.compile(r"d(?P<duplicate>\d+)|(?P<first>\d+)(?:-(?P<last>\d+)|x(?P<times>\d+))?")
LARGEST = 10_000_000


def parse_seed_list(text: str) -> list[int]:
    """The seeds that ``text`` stands for, in its order.

    Comma-separated parts: ``5`` is a seed, ``0-3`` are 0, 1, 2 and 3, ``4x3`` is 4 three times, and
    ``d2`` writes every seed of the parts behind it twice (each on top of its own ``x``), until the
    next ``d``. The notation of the ``--seeds`` option of the CSM release.

    Raises:
        ConfigError: a part that is none of these, a range that runs backwards, no seed at all, or
            more than ten million.

    >>> parse_seed_list("d2,5,d1,7-8")
    [5, 5, 7, 8]
    """
    seeds: list[int] = []
    duplicate = 1
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ConfigError(
                f"seed list '{text}': cannot read '{part.strip()}'; parts are seeds (5), ranges (0-3), "
                "repeats (4x3) and d8, which repeats all that follow"
            )
        if match["duplicate"]:
            duplicate = int(match["duplicate"])
            continue
        first = int(match["first"])
        last = int(match["last"] or first)
        times = duplicate * int(match["times"] or 1)
        if last < first:
            raise ConfigError(f"seed list '{text}': the range '{part.strip()}' runs backwards")
        if len(seeds) + (last - first + 1) * times > LARGEST:
            raise ConfigError(f"seed list '{text}': more than {LARGEST} seeds")
        seeds += [seed for seed in range(first, last + 1) for _ in range(times)]
    if not seeds:
        raise ConfigError(f"seed list '{text}' holds no seed")
    return seeds
