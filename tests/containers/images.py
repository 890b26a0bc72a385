"""The container images: built, measured, and the predict image used; and the pictures to find nuclei in."""

import json
import os
import re
import subprocess
import time
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.containers.engine import BASE
from tests.containers.steps import Protocol, Shell, StepError

__all__ = ["HARDENED", "LIMITS", "Images", "PredictImage", "counted"]

LIMITS = {"predict": 500, "train": 2200}
"""Image: most megabytes (10^6 bytes), uncompressed."""
HARDENED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true")
"""With what every container of the predict image runs here."""

_COUNT = 24
_SHARED = Path("../shared")
_WRITE_TIFFS = """
import pathlib, tifffile, cv2
folder = pathlib.Path("/work/my-images")
pixels = cv2.imread(str(sorted(folder.glob("*.png"))[0]), cv2.IMREAD_COLOR_RGB)
tifffile.imwrite(folder / "plain.tif", pixels, photometric="rgb")
tifffile.imwrite(folder / "jpeg.tif", pixels, photometric="rgb", compression="jpeg", tile=(128, 128))
"""
_GENERATE = """
import pathlib, nucleus.data.synthetic as synthetic
synthetic.write_generated(pathlib.Path("/work/stage1_train"), {count})
"""
_ASK = """
import json, pathlib, time, urllib.request
where = "http://127.0.0.1:8000"
for _ in range(120):
    try:
        urllib.request.urlopen(where + "/readyz").close()
        break
    except OSError:
        time.sleep(1)
page = urllib.request.urlopen(where + "/static/page/looks.css").read()
image = pathlib.Path("/work/my-images/plain.tif").read_bytes()
answer = json.load(urllib.request.urlopen(where + "/v1/segment", image))
print(json.dumps({"nuclei": answer["nuclei"], "page": len(page)}))
"""


@dataclass
class Images:
    """Builds the images and prepares the folder that the guide calls DATA.

    Attributes:
        data: That folder.
        shell: Runs programs with the engine.
        protocol: Where the steps go.
    """

    data: Path
    shell: Shell
    protocol: Protocol

    def prepare(self) -> None:
        """Build both images and write the data.

        Raises:
            StepError: An image was not built, is too large, or cannot write the data.
        """
        for extra in LIMITS:
            self.protocol.step("images", f"docker build, EXTRA={extra}", partial(self._build, extra))
        for extra, limit in LIMITS.items():
            self.protocol.step("images", f"size of nucleus:{extra}", partial(self._size, extra, limit))
        self.protocol.step("images", "images to train with", self._data)

    def _build(self, extra: str) -> str:
        arguments = ("--build-arg", f"BASE={BASE}", "--build-arg", f"EXTRA={extra}")
        self.shell.run("docker", "build", "--tag", f"nucleus:{extra}", *arguments, ".", timeout=3600)
        return f"nucleus:{extra}"

    def _size(self, extra: str, limit: int) -> str:
        size = int(self.shell.run("docker", "image", "inspect", "--format", "{{.Size}}", f"nucleus:{extra}"))
        text = f"{size / 1e6:.0f} MB, compressed {self._compressed(extra) / 1e6:.0f} MB"
        self.protocol.facts[f"nucleus:{extra}"] = text
        if size > limit * 1e6:
            raise StepError(f"{text}, at most {limit} MB")
        return text

    def _compressed(self, extra: str) -> int:
        """Bytes of the layers as a registry keeps them."""
        command = ["docker", "save", f"nucleus:{extra}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=self.shell.variables) as saved:
            compressed = subprocess.run(["gzip", "--stdout"], stdin=saved.stdout, capture_output=True, check=True)
        return len(compressed.stdout)

    def _data(self) -> str:
        (self.data / "my-images").mkdir(parents=True, exist_ok=True)
        self.data.chmod(0o777)
        (self.data / "my-images").chmod(0o777)
        found = self.shell.folder / _SHARED / "data" / "dsb2018" / "stage1_train.zip"
        archive = self.data / "stage1_train.zip"
        text = _some_of(found, archive) if found.exists() else self._generate(archive)
        with zipfile.ZipFile(archive) as zipped:
            for name in [name for name in zipped.namelist() if "/images/" in name][:2]:
                (self.data / "my-images" / Path(name).name).write_bytes(zipped.read(name))
        for weights in (self.shell.folder / _SHARED / "weights").glob("*.weights.h5"):
            (self.data / weights.name).write_bytes(weights.read_bytes())
        self._python(_WRITE_TIFFS)
        return text

    def _generate(self, archive: Path) -> str:
        self._python(_GENERATE.format(count=_COUNT))
        with zipfile.ZipFile(archive, "w") as zipped:
            for path in (self.data / "stage1_train").rglob("*.png"):
                zipped.write(path, path.relative_to(self.data))
        return f"{_COUNT} generated images"

    def _python(self, program: str) -> None:
        options = ("--rm", "--volume", f"{self.data}:/work", "--entrypoint", "python")
        self.shell.run("docker", "run", *options, "nucleus:predict", "-c", program)


def counted(printed: dict[str, Any]) -> str:
    """What `nucleus predict --json` found.

    Args:
        printed: Its document.

    Returns:
        Numbers of images and nuclei.

    Raises:
        StepError: An image could not be read.
    """
    if printed["failures"]:
        raise StepError(f"failures: {printed['failures']}")
    return f"{len(printed['nuclei'])} images, {sum(printed['nuclei'].values())} nuclei"


def _some_of(found: Path, archive: Path) -> str:
    """Every so many-th image of an archive in Kaggle's layout, with its masks."""
    with zipfile.ZipFile(found) as whole, zipfile.ZipFile(archive, "w") as some:
        names = [name for name in whole.namelist() if not name.endswith("/")]
        images = sorted({name.split("/")[1] for name in names if name.count("/") > 1})
        chosen = set(images[:: max(1, len(images) // _COUNT)][:_COUNT])
        for name in names:
            if name.count("/") > 1 and name.split("/")[1] in chosen:
                some.writestr(name, whole.read(name))
    return f"{len(chosen)} images of the 2018 Data Science Bowl"


@dataclass
class PredictImage:
    """What `nucleus:predict` does, as docs/infra/image.md shows it: nobody's container, without a network.

    Attributes:
        data: The folder with `my-images/`.
        model: A pulled model.
        shell: Runs programs with the engine.
        protocol: Where the steps go.
    """

    data: Path
    model: Path
    shell: Shell
    protocol: Protocol

    def check(self) -> None:
        """Each step on its own."""
        for name, act in (
            ("nucleus --help", self._help),
            ("predict PNG, TIFF and JPEG in TIFF, read-only, no network", self._predict),
            ("predict as another user", self._another_user),
            ("serve, asked in the container", self._serve),
            ("SIGTERM ends it", self._terminate),
        ):
            with self.protocol.part():
                self.protocol.step("nucleus:predict", name, act)

    def _run(self, *words: str, user: int = 1000, status: int = 0) -> str:
        return self.shell.run("docker", "run", "--rm", *self._options(user), "nucleus:predict", *words, status=status)

    def _options(self, user: int) -> tuple[str, ...]:
        out = self.data.parent / f"results-{user}"
        out.mkdir(exist_ok=True)
        os.chown(out, user, user)
        volumes = (f"{self.data}:/work:ro", f"{self.model}:/model:ro", f"{out}:/out")
        mounts = [word for volume in volumes for word in ("--volume", volume)]
        return (*HARDENED, "--network", "none", "--user", f"{user}:{user}", *mounts)

    def _help(self) -> str:
        found = re.findall(r"^  (\w+) ", self._run("--help"), re.M)
        return f"{len(found)} commands"

    def _predict(self) -> str:
        printed = self._run("predict", "my-images", "--model", "/model", "--out", "/out/found", "--json")
        written = [path for path in (self.data.parent / "results-1000" / "found").rglob("*") if path.is_file()]
        names = {path.name for path in written}
        if not any("jpeg" in name for name in names) or not any("plain" in name for name in names):
            raise StepError(f"no result of the TIFFs: {sorted(names)}")
        return counted(json.loads(printed))

    def _another_user(self) -> str:
        self._run("predict", "my-images/plain.tif", "--model", "/model", "--out", "/out/found", user=4711)
        owners = {path.stat().st_uid for path in (self.data.parent / "results-4711").rglob("*")}
        if owners != {4711}:
            raise StepError(f"files of users {owners}")
        return "the files are that user's"

    def _serve(self) -> str:
        identity = self._detached("serve", "--model", "/model")
        try:
            found = json.loads(self.shell.run("docker", "exec", identity, "python", "-c", _ASK))
        finally:
            self.shell.keep(self.shell.run("docker", "logs", identity))
            self.shell.run("docker", "rm", "--force", identity)
        if not found["nuclei"]:
            raise StepError("no nucleus in plain.tif")
        return f"{found['nuclei']} nuclei in plain.tif, the page has its files"

    def _detached(self, *words: str) -> str:
        return self.shell.run("docker", "run", "--detach", *self._options(1000), "nucleus:predict", *words).strip()

    def _terminate(self) -> str:
        words = ("predict", "my-images", "--model", "/model", "--out", "/out/stopped", "--tta")
        identity = self._detached(*words)
        time.sleep(3)
        started = time.monotonic()
        self.shell.run("docker", "stop", "--time", "30", identity)
        seconds = time.monotonic() - started
        code = self.shell.run("docker", "inspect", "--format", "{{.State.ExitCode}}", identity).strip()
        self.shell.keep(self.shell.run("docker", "logs", identity))
        self.shell.run("docker", "rm", identity)
        if code != "143":
            raise StepError(f"exit status {code} after {seconds:.0f} s instead of 143")
        return f"exit status 143 after {seconds:.1f} s"
