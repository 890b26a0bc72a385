"""The tree explains the program: imports go one way, errors cross processes, `--help` loads nothing heavy."""

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from nucleus import errors

ROOT = Path(__file__).parents[1]
LAYERS = [
    "errors", "progress", "lazy", "text", "versions", "config", "storage", "data", "metrics", "model", "pictures",
    "registry", "predict", "training", "tracking", "runs", "report", "doctor", "cli", "api",
]  # fmt: skip
"""The modules and packages of `nucleus`; each imports only what stands before it."""


def imports_of(path: Path) -> set[str]:
    """What a file imports or reaches as an attribute of a package, at its top or anywhere else."""
    tree = ast.parse(path.read_text())
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules = [name for node in froms for name in (node.module or "", *(f"{node.module}.{a.name}" for a in node.names))]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    modules += [
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in {"nucleus", "job"}
    ]
    return set(modules)


def files_of(layer: str) -> list[Path]:
    module = ROOT / "nucleus" / f"{layer}.py"
    return [module] if module.exists() else sorted((ROOT / "nucleus" / layer).rglob("*.py"))


def test_every_module_has_a_layer() -> None:
    found = {
        path.stem for path in (ROOT / "nucleus").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert found - {"__init__", "__main__"} == {*LAYERS}


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_one_way(layer: str) -> None:
    above = {f"nucleus.{other}" for other in LAYERS[LAYERS.index(layer) + 1 :]}
    outside = {"ray"} if layer in {"cli", "api"} else {"job", "ray"}
    for path in files_of(layer):
        for module in imports_of(path):
            assert ".".join(module.split(".")[:2]) not in above, f"{path} imports {module}"
            assert module.split(".")[0] not in outside, f"{path} imports {module}"


def test_job_knows_no_command_line() -> None:
    for path in (ROOT / "job").rglob("*.py"):
        for module in imports_of(path):
            assert not module.startswith("nucleus.cli"), f"{path} imports {module}"


def test_errors_survive_pickling() -> None:
    for name in errors.__all__:
        error = getattr(errors, name)("what was expected")
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), "what was expected")
        assert isinstance(error, errors.NucleusError)


def test_errors_are_in_the_tree_of_the_docstring() -> None:
    assert errors.__doc__ is not None
    for name in errors.__all__:
        assert name in errors.__doc__


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['nucleus', '--help']\n"
        "try:\n    from nucleus.cli.main import main; main()\n"
        "except SystemExit: pass\n"
        "heavy = {'tensorflow', 'ray', 'wandb', 'keras', 'boto3', 'cv2', 'numpy', 'rich'} & set(sys.modules)\n"
        "sys.exit(','.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Commands:" in done.stdout


def test_no_machine_in_the_tree() -> None:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        if (ROOT / name).suffix in {".py", ".toml", ".md", ".txt", ".yaml"}:
            text = (ROOT / name).read_text()
            assert "pypi" + ".org" not in text, name
            assert "/ro" + "ot/" not in text, name
