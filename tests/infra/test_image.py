"""The Dockerfile and what it leaves out, as far as no engine is needed; `make containers` builds and runs it."""

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infra.image import slim

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
LINES = re.sub(r"\\\n\s*(?:#.*\n\s*)*", " ", TEXT).splitlines()
"""The instructions, continued lines joined."""
EXTRAS = ("predict", "train", "train-gpu")


def instructions(name: str) -> list[str]:
    """What stands behind each instruction of a name."""
    return [line.removeprefix(name).strip() for line in LINES if line.startswith(f"{name} ")]


def test_hadolint_passes() -> None:
    linted = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), "--no-color", ROOT / "Dockerfile"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (linted.returncode, linted.stdout) == (0, ""), linted.stderr


def test_every_stage_begins_with_one_image_by_digest() -> None:
    base, *_ = [value for value in instructions("ARG") if value.startswith("BASE=")]
    assert re.fullmatch(r"BASE=python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", base)
    begun = {line.split()[0] for line in instructions("FROM")}
    stages = {line.split()[2] for line in instructions("FROM") if " AS " in line}
    assert begun - stages == {"${BASE}", "scratch", "image-${EXTRA}"}
    assert f'base.name="docker.io/library/{base.removeprefix("BASE=").partition("@")[0]}"' in TEXT


def test_every_kind_of_image_has_its_stage_and_its_lock() -> None:
    stages = {line.split()[2] for line in instructions("FROM") if " AS " in line}
    assert "EXTRA=train" in instructions("ARG")
    for extra in EXTRAS:
        assert f"image-{extra}" in stages
        assert (ROOT / "requirements" / f"{extra}.txt").is_file()
    tools = (ROOT / "requirements" / "dev.txt").read_text()
    assert all(f"\n{name}==" in f"\n{tools}" for name in ("uv", "uv-build"))  # which install and build the project


def test_only_the_program_goes_to_the_builder() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored[0] == "*"
    wanted = [line[1:] for line in ignored if line.startswith("!")]
    copies = [v.replace("${EXTRA}", "train").split() for v in instructions("COPY") if not v.startswith("--from")]
    for source in [source for *sources, _ in copies for source in sources]:
        assert (ROOT / source).exists()
        assert any(source.rstrip("/").startswith(name.partition("*")[0].rstrip("/")) for name in wanted), source
    assert all((ROOT / name).exists() or list(ROOT.glob(name)) for name in wanted)


def test_it_says_what_it_is_and_holds_no_secret() -> None:
    (labels,) = instructions("LABEL")
    version = re.search(r'image\.version="([\d.]+)"', labels)
    assert version
    assert f'version = "{version[1]}"' in (ROOT / "pyproject.toml").read_text()
    names = [re.split(r"[= ]", value)[0] for value in (*instructions("ARG"), *instructions("ENV"))]
    assert not [name for name in names if re.search("KEY|SECRET|TOKEN|PASSWORD", name)]


def test_users_and_entry_points() -> None:
    assert instructions("USER") == ["1000:1000"] * 2
    assert instructions("ENTRYPOINT") == ['["tini", "--"]', '["nucleus"]']
    assert all("--uid 1000" in run for run in instructions("RUN") if "useradd" in run)


@pytest.mark.parametrize("run", [run for run in instructions("RUN") if "apt-get install" in run])
def test_debian_has_the_packages(run: str) -> None:
    if "VERSION_CODENAME=bookworm" not in Path("/etc/os-release").read_text():
        pytest.skip("this machine is not the image's Debian 12")
    names = re.findall(r'"([\w-]+=[^"]+)"', run)
    assert names
    simulated = subprocess.run(
        ["apt-get", "install", "--simulate", "--yes", "--no-install-recommends", *names],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "Unable to locate package" in simulated.stderr:
        pytest.skip("this machine has no list of Debian's packages: apt-get update")
    assert simulated.returncode == 0, simulated.stderr


def test_the_predict_image_keeps_what_a_shell_and_python_need() -> None:
    kept = (ROOT / "infra" / "image" / "predict-packages.txt").read_text().splitlines()
    assert kept == sorted(kept)
    assert {"bash", "coreutils", "ca-certificates", "libc6", "libssl3", "libstdc++6", "zlib1g"} <= set(kept)
    assert not {"apt", "perl-base", "passwd", "login"} & set(kept)


def fill(site: Path, *names: str) -> None:
    for name in names:
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text("content")


def test_what_is_left_out(tmp_path: Path) -> None:
    used = ("scipy/ndimage/a.py", "skimage/a.pyi", "botocore/data/s3/a.json.gz", "botocore/data/endpoints.json")
    never = ("scipy/tests/a.py", "pyarrow/include/a", "numpy/a.a", "onnxruntime/capi/libonnxruntime.so.1")
    not_to_predict = ("PIL/Image.py", "pygments/a.py", "scipy/stats/a.py", "botocore/data/ec2/a.json.gz")
    for extra, kept in (("train", {*used, *not_to_predict}), ("predict", {*used})):
        site = tmp_path / extra
        fill(site, *used, *never, *not_to_predict)
        assert slim.slim(extra, site) > 0
        assert {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()} == kept


def shared_object(package: str, pattern: str) -> Path:
    found = importlib.util.find_spec(package)
    assert found
    assert found.origin
    return next(iter(Path(found.origin).parents[1].glob(pattern)))


@pytest.mark.skipif(shutil.which("strip") is None, reason="needs strip: apt-get install binutils")
def test_symbols_are_dropped_only_where_the_file_still_loads(tmp_path: Path) -> None:
    """`strip` breaks the segments of OpenBLAS, which patchelf has changed; such a file stays as it is."""
    plain = shared_object("imagecodecs", "imagecodecs/_png*.so")
    changed = shared_object("numpy", "numpy.libs/libscipy_openblas*.so")
    for path in (plain, changed):
        shutil.copy(path, tmp_path)
    slim.slim("train", tmp_path)
    assert (tmp_path / plain.name).stat().st_size < plain.stat().st_size
    assert (tmp_path / changed.name).read_bytes() == changed.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([plain.name, changed.name])
    ctypes.CDLL(str(tmp_path / changed.name))
