"""A real Docker Engine with Compose and buildx, a base image and two S3 servers, on a Debian machine without any."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.containers.steps import Protocol, Shell, StepError

__all__ = ["BASE", "DEBIAN", "GO_PROGRAMS", "Engine"]

BASE = "nucleus-base:bookworm"
"""The name of the image that stands for the official Python image, where that cannot be pulled."""
DEBIAN = ("docker.io", "debootstrap", "iptables")
GO_PROGRAMS = {
    "docker-compose": ("github.com/docker/compose/v2@v2.40.3", "github.com/docker/compose/v2/cmd"),
    "docker-buildx": ("github.com/docker/buildx@v0.23.0", "github.com/docker/buildx/cmd/buildx"),
    "minio": ("github.com/minio/minio@latest", "github.com/minio/minio"),
    "versitygw": ("github.com/versity/versitygw@v1.8.0", "github.com/versity/versitygw/cmd/versitygw"),
}
"""Program: the module with its version, and the package that is compiled."""

_STORES = {"minio": "minio-local", "versitygw": "versitygw-local"}
_PLUGINS = ("docker-compose", "docker-buildx")
_NOT_IN_SLIM = (
    *("var/lib/apt/lists", "var/cache", "var/log"),
    *("usr/share/man", "usr/share/info", "usr/share/locale", "usr/share/lintian"),
)
"""Folders that the official slim image has emptied."""
_PIP = ("pip==24.0", "setuptools==79.0.1", "wheel==0.45.1")
_STORE_IMAGE = """
FROM {base}
RUN apt-get update && apt-get install --yes --no-install-recommends curl && rm -rf /var/lib/apt/lists/*
COPY {program} /usr/local/bin/
ENTRYPOINT ["{program}"]
"""


@dataclass
class Engine:
    """What is installed below a folder, and the engine that runs from there.

    Attributes:
        folder: Everything that is not a package of Debian.
        shell: Runs programs with this engine.
        protocol: Where steps and versions go.
    """

    folder: Path
    shell: Shell
    protocol: Protocol
    process: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        """Install, compile and start what is not there yet.

        Raises:
            StepError: Something could not be installed.
        """
        self._step("packages of Debian", self._debian)
        for program in GO_PROGRAMS:
            self._step(f"{program} from the Go proxy", partial(self._compile, program))
        self._step("engine", self._start)
        self._step("base image", self._base)
        for program, image in _STORES.items():
            self._step(f"image of {program}", partial(self._store_image, program, image))

    def stop(self) -> None:
        """Stop the engine, if it is ours."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(60)

    def _step(self, name: str, act: Callable[[], str]) -> None:
        self.protocol.step("tools", name, act)

    def _debian(self) -> str:
        missing = [name for name in DEBIAN if not self._installed(name)]
        if missing:
            self.shell.run("apt-get", "update")
            self.shell.run("apt-get", "install", "--yes", "--no-install-recommends", *missing)
        return f"installed {', '.join(missing)}" if missing else f"there already: {', '.join(DEBIAN)}"

    def _installed(self, package: str) -> bool:
        done = subprocess.run(["dpkg-query", "--status", package], capture_output=True, text=True, check=False)
        return "Status: install ok installed" in done.stdout

    def _compile(self, program: str) -> str:
        module, package = GO_PROGRAMS[program]
        binary = self.folder / "tools" / program
        if not binary.exists():
            source = self.folder / "source" / program
            source.mkdir(parents=True, exist_ok=True)
            go = ("env", f"--chdir={source}", "CGO_ENABLED=0", "GOFLAGS=-mod=mod", "go")
            if not (source / "go.mod").exists():
                self.shell.run(*go, "mod", "init", program)
            self.shell.run(*go, "get", module)
            self.shell.run(*go, "build", "-ldflags=-s -w", "-o", binary, package, timeout=3600)
        version = self._module_version(binary, module.partition("@")[0])
        self.protocol.facts[program] = version
        return version

    def _module_version(self, binary: Path, module: str) -> str:
        for line in self.shell.run("go", "version", "-m", binary).splitlines():
            words = line.split()
            if len(words) > 2 and words[0] in {"dep", "mod"} and words[1] == module:
                return words[2]
        raise StepError(f"{binary} was not built from {module}. Remove it.")

    def _start(self) -> str:
        plugins = self.folder / "config" / "cli-plugins"
        plugins.mkdir(parents=True, exist_ok=True)
        for name in _PLUGINS:
            (plugins / name).unlink(missing_ok=True)
            (plugins / name).symlink_to(self.folder / "tools" / name)
        home = self.folder / "engine"
        self.shell.environment |= {"DOCKER_HOST": f"unix://{home}/sock", "DOCKER_CONFIG": str(plugins.parent)}
        if not self._answers():
            self._spawn(home)
        names = ("ServerVersion", "CgroupVersion", "Driver", "KernelVersion", "OperatingSystem")
        found = self.shell.run("docker", "info", "--format", "\n".join(f"{{{{.{name}}}}}" for name in names))
        facts = dict(zip(names, found.splitlines(), strict=True))
        self.protocol.facts |= {
            "Docker Engine": facts["ServerVersion"],
            "machine": f"{facts['OperatingSystem']}, Linux {facts['KernelVersion']}, {os.cpu_count()} cores",
        }
        return f"Docker Engine {facts['ServerVersion']}, cgroups v{facts['CgroupVersion']}, {facts['Driver']}"

    def _answers(self) -> bool:
        with suppress(StepError):
            return bool(self.shell.run("docker", "version", "--format", "{{.Server.Version}}"))
        return False

    def _spawn(self, home: Path) -> None:
        home.mkdir(exist_ok=True)
        words = ["--data-root", home / "data", "--exec-root", home / "exec", "--pidfile", home / "pid"]
        with (home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["dockerd", *map(str, words), "--host", f"unix://{home}/sock"], stdout=log, stderr=log
            )
        for _ in range(60):
            time.sleep(1)
            if self._answers():
                return
        raise StepError(f"dockerd does not answer. See {home}/log.")

    def _base(self) -> str:
        official = next(
            line.partition("=")[2]
            for line in (self.shell.folder / "Dockerfile").read_text().splitlines()
            if line.startswith("ARG BASE=")
        )
        with suppress(StepError):
            self.shell.run("docker", "pull", official)
            self.shell.run("docker", "tag", official, BASE)
            return f"pulled {official}"
        if not self._has(BASE):
            self._bootstrap()
        size = int(self.shell.run("docker", "image", "inspect", "--format", "{{.Size}}", BASE))
        return f"{official.partition('@')[0]} cannot be pulled; Debian 12 and its Python 3.11, {size / 1e6:.0f} MB"

    def _has(self, image: str) -> bool:
        return bool(self.shell.run("docker", "images", "--quiet", image))

    def _bootstrap(self) -> None:
        """Debian's smallest system with its Python, without documents, as the official image is made."""
        root = self.folder / "base"
        shutil.rmtree(root, ignore_errors=True)
        include = "--include=python3.11,ca-certificates,netbase,tzdata"
        self.shell.run("debootstrap", "--variant=minbase", include, "bookworm", root)
        for folder in _NOT_IN_SLIM:
            shutil.rmtree(root / folder, ignore_errors=True)
            (root / folder).mkdir(exist_ok=True)
        for path in (root / "usr/share/doc").rglob("*"):
            if path.name != "copyright" and not (path.is_dir() and not path.is_symlink()):
                path.unlink()
        (root / "usr/lib/python3.11/EXTERNALLY-MANAGED").unlink()
        for name in ("python", "python3", "python3.11"):
            (root / "usr/local/bin" / name).symlink_to("/usr/bin/python3.11")
        packages = root / "usr/local/lib/python3.11/dist-packages"
        self.shell.run("python3", "-m", "pip", "install", "--quiet", "--no-compile", "--target", packages, *_PIP)
        self._settings_of_this_machine(root)
        self._import_root(root)

    def _settings_of_this_machine(self, root: Path) -> None:
        """The certificates and settings with which this machine reaches its package registry."""
        for path in (Path("/etc/ssl/certs/ca-certificates.crt"), Path("/etc/pip.conf")):
            if path.exists():
                shutil.copy(path, root / path.relative_to("/"))

    def _import_root(self, root: Path) -> None:
        path = "PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
        change = f"ENV {path} LANG=C.UTF-8 SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt"
        archive = self.folder / "base.tar"
        self.shell.run("tar", "--directory", root, "--create", "--file", archive, ".")
        self.shell.run("docker", "import", "--change", change, "--change", 'CMD ["python3"]', archive, BASE)
        archive.unlink()
        shutil.rmtree(root)

    def _store_image(self, program: str, image: str) -> str:
        if not self._has(image):
            context = self.folder / "source" / f"{program}-image"
            context.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folder / "tools" / program, context)
            (context / "Dockerfile").write_text(_STORE_IMAGE.format(base=BASE, program=program))
            self.shell.run("docker", "build", "--tag", image, context)
        return image
