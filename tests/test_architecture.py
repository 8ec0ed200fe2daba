"""Who imports whom: the package's imports against the table of the design."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "diffcal"
CALIBRATION_CORE = {"calibration.losses", "calibration.posthoc", "calibration.metrics"}

# unit -> units it may import besides itself and errors
ALLOWED = {
    "errors": set(),
    "config": set(),
    "core": {"config"},
    "data": {"core", "config"},
    "models": {"core", "config"},
    "calibration.losses": {"core", "config"},
    # criteria of a fit are metrics (ECE, temperature): one place for each
    "calibration.posthoc": {"core", "config", "calibration.metrics"},
    "calibration.metrics": {"core", "config"},
    "calibration": {"core", "config", "data", "models", *CALIBRATION_CORE},
    "diffusion": {"core", "config", "data"},
    "mixing": {"core", "config", "data", "models", "diffusion"},
    "attribution": {"core", "config", "data", "models", "diffusion"},
}
EVERYTHING = {*ALLOWED, "workflows", "__init__"}
ALLOWED["workflows"] = EVERYTHING
ALLOWED["cli"] = {"config", "workflows", "data", "__init__"}
ALLOWED["__main__"] = {"cli"}
ALLOWED["__init__"] = {"diffusion"}

# heavy library -> modules through which it may enter
DOORS = {
    "diffusers": ("diffcal.diffusion.diffusers_", "diffcal.diffusion.stable_diffusion"),
    "transformers": ("diffcal.models.encoders", "diffcal.diffusion.stable_diffusion"),
    "xformers": ("diffcal.diffusion.attention",),
}


def _modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield path, ".".join(("diffcal", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def _unit(module: str) -> str:
    parts = module.split(".")[1:]
    if not parts:
        return "__init__"
    deep = ".".join(parts[:2])
    return deep if deep in CALIBRATION_CORE else parts[0]


def _imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


@pytest.mark.parametrize(("path", "module"), list(_modules()), ids=lambda value: str(value)[-40:])
def test_imports_follow_the_table(path, module):
    unit = _unit(module)
    for name in _imports(path):
        if name.split(".")[0] == "diffcal":
            target = _unit(name)
            assert target in {unit, "errors", *ALLOWED[unit]}, f"{module} imports {name}"
        top = name.split(".")[0]
        if top in DOORS:
            assert module.startswith(DOORS[top]), f"{module} imports {top}; doors: {DOORS[top]}"


def test_table_names_every_unit():
    assert {_unit(module) for _, module in _modules()} <= set(ALLOWED)


def test_torch_stays_out_of_the_command_line():
    for name in ("cli.py", "__init__.py", "__main__.py", "config.py", "errors.py"):
        tree = ast.parse((PACKAGE / name).read_text("utf-8"))
        top_level = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {
            (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
            for node in top_level
        }
        assert not {name for name in names if name.split(".")[0] in ("torch", "numpy", "diffusers")}
