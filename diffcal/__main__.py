"""``python -m diffcal`` is the command ``diffcal``."""

from diffcal.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
