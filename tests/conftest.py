"""One thread for each pytest worker, before torch is imported: workers share the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("DIFFCAL_PROGRESS", "0")

from hypothesis import settings

# A deadline would measure time, and time says nothing about a busy machine.
settings.register_profile("diffcal", deadline=None)
settings.load_profile("diffcal")
