"""The shape of the code: layers, sizes and names of modules, stubs, lazy imports, and errors that cross processes."""

import ast
import os
import pickle
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import median

import pytest

from nucleus import errors

ROOT = Path(__file__).parents[1]
LAYERS = [
    "errors", "progress", "surroundings", "lazy", "text", "config", "storage", "data", "metrics", "model",
    "pictures", "registry", "predict", "serve", "training", "tracking", "runs", "page", "report", "doctor", "cli",
    "api",
]  # fmt: skip
"""The modules and packages of `nucleus`; each imports only what stands before it."""


MODULES = sorted(path for package in ("nucleus", "job") for path in (ROOT / package).rglob("*.py"))
"""Every file; the packages' `__init__.py` have a docstring and what `lazy_loader` needs."""
NAMED = [path for path in MODULES if not path.stem.startswith("__")]
COMMANDS = sorted(path for path in (ROOT / "nucleus" / "cli").glob("*.py") if not path.stem.startswith("__"))
HEAVY = {"tensorflow", "keras", "wandb"}
"""Imported by `nucleus/lazy.py` alone; their submodules cannot be reached through it and are imported where used."""


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


def test_modules_are_few_and_of_one_size() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in MODULES}
    assert len(NAMED) <= 190
    assert [f"{path}: {count}" for path, count in lines.items() if count > 450] == []
    assert median(lines[path] for path in NAMED) >= 150


def test_each_module_has_a_name_of_its_own() -> None:
    assert [name for name, count in Counter(path.stem for path in NAMED).items() if count > 1] == []


def test_each_module_is_in_the_architecture() -> None:
    named = set(re.findall(r"`([a-z0-9_]+)`", (ROOT / "docs" / "architecture.md").read_text()))
    assert {path.stem for path in NAMED} - named == set()


def test_heavy_libraries_are_imported_in_one_place() -> None:
    for path in set(MODULES) - {ROOT / "nucleus" / "lazy.py"}:
        found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import)]
        assert not HEAVY & {alias.name for node in found for alias in node.names}, path
        assert not HEAVY & imports_from(path), path


def test_imports_inside_functions_are_of_slow_libraries() -> None:
    """Ruff asks for a reason elsewhere; in `job` it is that Ray takes a second to import."""
    for path in (ROOT / "job").rglob("*.py"):
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        inside = [node for function in functions for node in ast.walk(function)]
        names = [alias.name for node in inside if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in inside if isinstance(node, ast.ImportFrom)]
        assert {name.split(".")[0] for name in names} <= {"ray", "requests", "aiohttp"}, path


def imports_from(path: Path) -> set[str]:
    """The modules `m` of a file's statements `from m import ...`."""
    return {node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}


def test_stubs_are_those_of_the_modules() -> None:
    """`lazy_loader` exposes what a package's `__init__.pyi` lists: each name in `__all__` of a module, once."""
    for path, text in runpy.run_path(str(ROOT / "docs" / "generate.py"))["stubs"]().items():
        assert path.read_text() == text, f"{path} is not what the modules list. Run: python docs/generate.py --stubs"


def test_every_exposed_name_exists() -> None:
    """`EAGER_IMPORT` has `lazy_loader` import all that the stubs list."""
    environment = {**os.environ, "EAGER_IMPORT": "1"}
    command = [sys.executable, "-c", "import nucleus, job"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_names_reached_through_a_package_are_exposed_by_it() -> None:
    """A module that happens to be imported already can be reached too: mypy and most tests would not notice."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            owner = ast.unparse(node.value)
            package = ROOT / owner.replace(".", "/") / "__init__.pyi"
            if owner.startswith("nucleus.") and package.exists():
                assert f" as {node.attr}\n" in package.read_text() + "\n", f"{path}: {owner}.{node.attr}"


def test_the_driver_and_the_commands_load_no_tensorflow() -> None:
    """It takes seconds, and the driver, Ray's controller and most commands never use it.

    Nor do tests of one file, and the many processes of `tests/faults/test_publishing.py`.
    """
    modules = ["job.train", "job.sweep", "job.inference", "nucleus.api", *(f"nucleus.cli.{p.stem}" for p in COMMANDS)]
    modules += ["tests.conftest", "tests.faults.test_publishing"]
    code = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"tensorflow", "keras", "wandb", "matplotlib"} & set(done.stdout.split())


def test_lists_of_runs_and_models_need_no_reader_of_images() -> None:
    """Which took a third of the time to import."""
    code = "import sys, nucleus.runs.run_rows, nucleus.registry.versions\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"cv2", "tifffile"} & set(done.stdout.split())


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


def is_private_to_ray(name: str) -> bool:
    parts = name.split(".")
    return parts[0] == "ray" and any(part.startswith("_") or part == "v2" for part in parts)


def test_private_names_of_ray_stand_in_two_files() -> None:
    """Modules of Ray, and attributes of its objects: whatever begins with an underscore and is not our own."""
    for path in sorted((ROOT / "job").rglob("*.py")):
        if path.name in {"ray_internals.py", "__init__.py"}:
            continue
        if path.name != "ray_errors.py":  # has attributes of errors, as texts
            assert not {text for text in strings_of(path) if re.fullmatch(r"_[a-z]\w*", text)}, path
        for module in imports_of(path):
            assert not is_private_to_ray(module), f"{path} imports {module}"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
                assert ast.unparse(node.value) in {"self", "cls", "other"}, f"{path} uses {ast.unparse(node)}"


HOMES = {
    "runs/plan.py": {"runs/", "run.json"},
    "runs/state.py": {"state.json"},
    "runs/run_rows.py": {".index.json"},
    "runs/record.py": {"attempts.json", "history.json", "record.json", "facts.json", "report.html"},
    "registry/manifest.py": {"models/", "manifest.json"},
    "registry/publish.py": {"claim.json"},
    "registry/encoder_weights.py": {"weights/"},
    "data/dataset.py": {"datasets/", "manifest.json"},
    "model/architecture.py": {
        *("model.json", "model.weights.h5", "model.onnx", "metrics.json", "card.md", "preview.png"),
    },
    "training/checkpoint.py": {"state.json"},
    "storage/bucket.py": {"models/"},
}
"""Names in the bucket by the file below `nucleus` that has them. A checkpoint has a `state.json` too; the object with
which `storage` tries conditional writes lies below `models/`, of which it knows nothing else."""
NAMES = sorted({name for names in HOMES.values() for name in names})


def names_in(text: str) -> set[str]:
    """The names of `NAMES` that a string uses as a key or a path: text with blanks is prose."""
    if any(letter.isspace() for letter in text):
        return set()
    return {name for name in NAMES if (text.startswith(name) if name[-1] == "/" else f"/{text}".endswith(f"/{name}"))}


def strings_of(path: Path) -> set[str]:
    """The strings in a file's code, without docstrings; names that are joined to paths end in a slash."""
    tree = ast.parse(path.read_text())
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    joined = [node.right for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)]
    return {str(node.value) for node in constants if id(node) not in prose} | {
        f"{node.value}/" for node in joined if isinstance(node, ast.Constant)
    }


def test_each_name_in_the_bucket_has_one_home() -> None:
    for path in [*sorted((ROOT / "nucleus").rglob("*.py")), *sorted((ROOT / "job").rglob("*.py"))]:
        home = HOMES.get(path.relative_to(ROOT).as_posix().removeprefix("nucleus/"), set())
        for text in strings_of(path):
            assert names_in(text) <= home, f"{path} has {text!r} of its own"
