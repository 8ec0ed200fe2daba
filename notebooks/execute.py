"""Run notebooks from top to bottom and save them with what they show.

    python notebooks/execute.py                       # all of them
    python notebooks/execute.py notebooks/01_csm.ipynb

Each runs in an empty folder of its own and without progress bars. Saved are outputs, a hash of the code
that gave them (the tests compare it), and nothing that tells the machine or the hour.
"""

import argparse
import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent

QUIET = {
    # Bars are for eyes, not for files.
    "DIFFCAL_PROGRESS": "0",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found",
    # Nothing here is to be fetched.
    "HF_HUB_OFFLINE": "1",
}


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of the code cells."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode("utf-8")).hexdigest()


def execute(path: Path, folder: Path, timeout: float = 3600) -> nbformat.NotebookNode:
    """The notebook at ``path`` with the outputs of a run in ``folder``.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message has its code and traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    os.environ.update(QUIET)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=timeout,
        startup_timeout=300,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )
    client.execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "diffcal": {"code_sha256": code_hash(notebook)},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata = {}
    return notebook


def main() -> None:
    """Execute the notebooks that are named, or all, and save them in place."""
    parser = argparse.ArgumentParser(description="Run notebooks and save them with their outputs.")
    parser.add_argument("notebooks", type=Path, nargs="*")
    for path in parser.parse_args().notebooks or sorted(FOLDER.glob("*.ipynb")):
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, Path(folder))
        nbformat.write(notebook, path)
        size, seconds = path.stat().st_size / 1024, time.monotonic() - started
        sys.stderr.write(f"{path.name}: {seconds:.0f} s, {size:.0f} kB\n")


if __name__ == "__main__":
    main()
