"""The Dockerfile: linted, and its steps carried out in a clean directory, for no engine is at hand to build it."""

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.infra.dockerfile import Instruction, Stage, read_stages

ROOT = Path(__file__).parents[2]
BUILD, IMAGE = read_stages(ROOT / "Dockerfile")
OWN = re.compile(r"(?<![\w.])/(opt|build|etc|home)(?=/|\b)")
"""Paths of the image that stand for folders below the clean directory here; /proc, /tmp and /dev are this machine's."""
CACHE = "/var/cache/uv"
UID = 1000


def values(stage: Stage, *names: str) -> dict[str, str]:
    """What ARG (defaults) or ENV instructions set."""
    steps = [step for step in stage.steps if step.name in names]
    pairs = [word.partition("=") for step in steps for word in shlex.split(step.value)]
    return {name: value for name, _, value in pairs}


def commands(stage: Stage) -> list[list[str]]:
    """Each command of the stage's RUN instructions, as words."""
    runs = [step.value for step in stage.steps if step.name == "RUN"]
    return [shlex.split(command) for run in runs for command in run.split("&&")]


def command(stage: Stage, *start: str) -> list[str]:
    """The one command that begins so."""
    (found,) = [words for words in commands(stage) if tuple(words[: len(start)]) == start]
    return found


class Builder:
    """Carries out a stage's instructions below a folder."""

    def __init__(self, root: Path, python: Path) -> None:
        self.root = root
        self.environment = {
            # How this machine reaches its package registry, and no more of its environment.
            **{name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "UV_"))},
            "PATH": f"{python.parent}:/usr/bin:/bin",
            "HOME": str(root / "builder"),
        }
        self.folder = root
        self.shell = ["/bin/sh", "-c"]

    def here(self, text: str) -> str:
        return OWN.sub(rf"{self.root}/\1", text)

    def carry_out(self, stage: Stage) -> None:
        for step in stage.steps:
            getattr(self, f"_{step.name.lower()}")(step)

    def _arg(self, step: Instruction) -> None:
        name, _, value = step.value.partition("=")
        self.environment[name] = value

    def _env(self, step: Instruction) -> None:
        self.environment |= dict(word.split("=", 1) for word in shlex.split(step.value))
        # Neither changes what is installed; compiled and copied instead of linked it takes a minute longer.
        self.environment |= {"UV_COMPILE_BYTECODE": "0", "UV_LINK_MODE": "hardlink"}

    def _shell(self, step: Instruction) -> None:
        self.shell = step.words

    def _workdir(self, step: Instruction) -> None:
        self.folder = Path(self.here(step.value))
        self.folder.mkdir(parents=True)

    def _copy(self, step: Instruction) -> None:
        *sources, target = step.value.split()
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, self.folder / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, self.folder / target)

    def _run(self, step: Instruction) -> None:
        script = self.here(step.value)
        if "mount" in step.flags:
            assert step.flags["mount"] == f"type=cache,target={CACHE}"
            script = script.replace(f"--cache-dir {CACHE}", "")  # this machine's own cache stands for the builder's
            self.environment["UV_CACHE_DIR"] = uv_cache()
        done = subprocess.run(
            [*self.shell, script], cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"


def uv_cache() -> str:
    found = subprocess.run(
        [sys.executable, "-m", "uv", "cache", "dir"], capture_output=True, text=True, check=True
    ).stdout
    return found.strip()


@pytest.fixture(scope="module")
def built() -> Iterator[Path]:
    """The clean directory after the build stage. pytest's own folders are closed to other users."""
    base = shutil.which("python3.11", path="/usr/local/bin:/usr/bin:/bin") or sys._base_executable  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory(prefix="nucleus-image-") as name:
        root = Path(name)
        root.chmod(0o755)
        subprocess.run([base, "-m", "venv", root / "base"], check=True)  # stands for the base image's Python
        Builder(root, root / "base" / "bin" / "python").carry_out(BUILD)
        yield root


def test_hadolint_passes() -> None:
    linted = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), "--no-color", ROOT / "Dockerfile"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (linted.returncode, linted.stdout) == (0, ""), linted.stderr


def test_both_stages_begin_with_the_same_image_by_digest() -> None:
    assert BUILD.base == IMAGE.base
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", IMAGE.base)


def test_every_kind_of_image_has_its_lock() -> None:
    assert values(BUILD, "ARG")["EXTRA"] == values(IMAGE, "ARG")["EXTRA"] == "cpu"
    for extra in ("cpu", "gpu"):
        locked = (ROOT / "requirements" / f"{extra}.txt").read_text()
        assert "\nsetuptools==" in locked  # which builds the project itself


def test_only_the_program_goes_to_the_builder() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored[0] == "*"
    wanted = [line[1:] for line in ignored if line.startswith("!")]
    sources = [word for step in BUILD.steps if step.name == "COPY" for word in step.value.split()[:-1]]
    for source in sources:
        assert any(fnmatch.fnmatch(source.rstrip("/"), name.partition("/")[0]) for name in wanted), source
    assert all((ROOT / name).exists() or list(ROOT.glob(name)) for name in wanted)


def test_it_says_what_it_is_and_holds_no_secret() -> None:
    labels = values(IMAGE, "LABEL")
    assert labels["org.opencontainers.image.title"] == "nucleus"
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{labels["org.opencontainers.image.version"]}"' in project
    assert labels["org.opencontainers.image.base.name"].split("/")[-1] == IMAGE.base.partition("@")[0]
    names = {*values(BUILD, "ARG", "ENV"), *values(IMAGE, "ARG", "ENV")}
    assert not [name for name in names if re.search("KEY|SECRET|TOKEN|PASSWORD", name)]


def test_debian_has_the_packages() -> None:
    if "VERSION_CODENAME=bookworm" not in Path("/etc/os-release").read_text():
        pytest.skip("this machine is not the image's Debian 12")
    install = command(IMAGE, "apt-get", "install")
    simulated = subprocess.run([*install, "--simulate"], capture_output=True, text=True, check=False)
    if "Unable to locate package" in simulated.stderr:
        pytest.skip("this machine has no list of Debian's packages: apt-get update")
    assert simulated.returncode == 0, simulated.stderr
    assert {name.partition("=")[0] for name in install if "=" in name} >= {"tini", "wget", "rsync", "openssh-client"}


def test_user_is_made_as_the_image_says(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root makes users")
    (tmp_path / "etc" / "profile.d").mkdir(parents=True)
    for name in ("passwd", "group", "shadow", "gshadow"):
        (tmp_path / "etc" / name).touch()
    (tmp_path / "home").mkdir()
    make, own, *_ = [words for words in commands(IMAGE) if words[0] in {"useradd", "install"}]
    subprocess.run(["/usr/sbin/useradd", "--prefix", tmp_path, *make[1:]], check=True, capture_output=True)
    assert f"nucleus:x:{UID}:{UID}::/home/nucleus:/bin/bash" in (tmp_path / "etc" / "passwd").read_text()
    subprocess.run([OWN.sub(rf"{tmp_path}/\1", word) for word in own], check=True)
    for step in (IMAGE.only("WORKDIR").value, f"{values(IMAGE, 'ENV')['HOME']}/.cache"):
        assert (tmp_path / step.lstrip("/")).stat().st_uid == UID  # or a named volume there would be root's
    assert IMAGE.only("USER").value == f"{UID}:{UID}"


def as_user(root: Path, words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run as the image's user with the image's environment, and nothing of this machine's."""
    home = root / "home" / "nucleus"
    home.mkdir(parents=True, exist_ok=True)
    drop = []
    if os.geteuid() == 0:
        os.chown(home, UID, UID)
        drop = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
    settings = {name: OWN.sub(rf"{root}/\1", value) for name, value in values(IMAGE, "ENV").items()}
    return subprocess.run(
        [*drop, *words], cwd=home, env={**settings, **environment}, capture_output=True, text=True, check=False
    )


def test_installs_and_runs_as_its_user(built: Path) -> None:
    assert IMAGE.only("ENTRYPOINT").words == ["tini", "--"]
    helped = as_user(built, IMAGE.only("CMD").words)
    assert helped.returncode == 0, helped.stderr
    assert "Commands:" in helped.stdout
    modules = "keras, tensorflow, ray, boto3, job.train, nucleus"
    script = f"import {modules}; print(nucleus.__file__, keras.backend.backend())"
    imported = as_user(built, ["python", "-c", script], TF_CPP_MIN_LOG_LEVEL="3")
    assert imported.returncode == 0, imported.stderr
    place, backend = imported.stdout.split()
    assert Path(place).is_relative_to(built / "opt" / "nucleus")
    assert backend == "tensorflow"
    assert list((built / "opt" / "nucleus").glob("lib/python3.11/site-packages/job/recipes/dsb2018-gpu.toml"))
    assert as_user(built, ["touch", str(built / "opt" / "nucleus" / "file")]).returncode != 0 or os.geteuid() != 0


def test_what_is_installed_is_the_lock(built: Path) -> None:
    freeze = [sys.executable, "-m", "uv", "pip", "freeze", "--python", built / "opt" / "nucleus" / "bin" / "python"]
    found = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout.splitlines()
    locked = re.findall(r"^([\w.-]+==[^ ]+) \\$", (ROOT / "requirements" / "cpu.txt").read_text(), flags=re.MULTILINE)
    assert {line for line in found if not line.startswith("nucleus @")} == set(locked)


def test_login_shells_find_it(built: Path) -> None:
    script = next(run.value.split("&&")[-1] for run in IMAGE.steps if run.name == "RUN" and "profile.d" in run.value)
    (built / "etc" / "profile.d").mkdir(parents=True, exist_ok=True)
    subprocess.run(["/bin/sh", "-c", OWN.sub(rf"{built}/\1", script)], check=True)
    shell = f'PATH=/usr/bin:/bin; . "{built}/etc/profile.d/nucleus.sh"; command -v nucleus ray python'
    found = as_user(built, ["bash", "-c", shell])
    assert found.stdout.split() == [
        str(built / "opt" / "nucleus" / "bin" / name) for name in ("nucleus", "ray", "python")
    ]


def test_health_check(built: Path) -> None:
    check = IMAGE.only("HEALTHCHECK").value.partition("CMD ")[2]
    words = Instruction("CMD", {}, check).words
    no_ray = [word.replace("raylet /proc", "raylet-of-no-machine /proc") for word in words]
    assert as_user(built, no_ray).returncode == 0
    assert as_user(built, no_ray, PATH="/usr/bin:/bin").returncode != 0
    dumb = [word.replace("grep -qsx raylet /proc/[0-9]*/comm", "true").replace(":52365/", ":9/") for word in words]
    assert as_user(built, dumb).returncode != 0  # a raylet whose agent does not answer
