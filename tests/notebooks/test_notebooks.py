"""The notebooks run from top to bottom, and what is committed is what their code gives."""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
LARGEST = 400_000  # bytes

RUNNER = """
import ast, json, os, sys
import matplotlib
from IPython.core.formatters import DisplayFormatter

matplotlib.use("agg")
shown = DisplayFormatter()
cells = json.load(open(sys.argv[1], encoding="utf-8"))
names = {"__name__": "__main__"}
for number, source in cells:
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, f"cell {number}", "exec"), names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
        if value is not None:
            kinds = shown.format(value)[0]
            print(json.dumps({"cell": number, "kinds": sorted(kinds)}), file=sys.stderr)
print(json.dumps({"finished": len(cells)}), file=sys.stderr)
"""
"""Executes cells in one namespace and says which kinds of output their last expressions have."""


def code_cells(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return [(n, "".join(c["source"]), c) for n, c in enumerate(cells) if c["cell_type"] == "code"]


def test_all_four_are_there():
    names = ["01_csm", "02_das", "03_calibration", "04_bring_your_own_model"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_shows_what_is_committed(path, tmp_path):
    (tmp_path / "runner.py").write_text(RUNNER)
    cells = code_cells(path)
    (tmp_path / "cells.json").write_text(json.dumps([(n, source) for n, source, _ in cells]))
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, str(tmp_path / "runner.py"), str(tmp_path / "cells.json")],
        cwd=work,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"')]
    assert lines[-1] == {"finished": len(cells)}
    found = {line["cell"]: line["kinds"] for line in lines[:-1]}
    for number, _, cell in cells:
        results = [out for out in cell["outputs"] if out["output_type"] == "execute_result"]
        kinds = sorted(results[0]["data"]) if results else None
        assert found.get(number) == kinds, f"cell {number}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed(path):
    assert path.stat().st_size < LARGEST
    notebook = json.loads(path.read_text("utf-8"))
    cells = code_cells(path)
    code = "\0".join(source for _, source, _ in cells)
    made_from = notebook["metadata"]["diffcal"]["code_sha256"]
    # Cells that changed since the outputs were made: run `make notebooks`.
    assert hashlib.sha256(code.encode("utf-8")).hexdigest() == made_from
    # Every cell ran, once, in order.
    assert [cell["execution_count"] for *_, cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for *_, cell in cells for output in cell["outputs"]]
    assert len(outputs) >= len(cells) // 2
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert not [out for out in outputs if out["output_type"] == "error"]
    assert not [out for out in outputs if out.get("name") == "stderr"]
    assert set(notebook["metadata"]) == {"kernelspec", "language_info", "diffcal"}
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    text = json.dumps([{**cell, "outputs": _words(cell)} for cell in notebook["cells"]])
    found = re.search(r"(?<![\w.\]/:])/(home|root|tmp|usr|var|work|Users|opt|mnt)\b", text)
    assert found is None, text[found.start() - 40 : found.end() + 40]
    assert "\\\\Users" not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_readers_find_the_files_that_it_names(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    for cell in cells:
        if cell["cell_type"] == "markdown":
            for target in re.findall(r"\]\((?!http)([^)#]+)\)", "".join(cell["source"])):
                assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_teaches_the_public_face(path):
    for number, source, _ in code_cells(path):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffcal"):
                private = [a.name for a in node.names if a.name.startswith("_")]
                assert not private, f"cell {number} imports {private[0]}"


def _words(cell):
    """Outputs without the bytes of pictures."""
    return [
        {**out, "data": {k: v for k, v in out.get("data", {}).items() if k != "image/png"}}
        for out in cell.get("outputs", [])
    ]
