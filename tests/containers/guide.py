"""docs/infra/local.md on a real engine: every command of the guide, and what it promises about the containers."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.containers.engine import BASE
from tests.containers.images import HARDENED, counted
from tests.containers.steps import Protocol, Shell, StepError

__all__ = ["Guide", "Store"]

_PROJECT = "nucleus-check"
_DASHBOARD, _STORE_PORT = 18265, 19000
_SMALL = tuple(
    word
    for setting in (
        "workers=2",
        "input.crop=96",
        "input.batch_size=4",
        "optimizer.warmup_steps=4",
        "optimizer.ema_momentum=0.9",
    )
    for word in ("--set", setting)
)
_RANDOM = ("--set", 'network.weights="none"', "--set", "network.freeze_encoder=false")
_HARDENED = {"store": True, "ray-cpu": False}
"""Long-running services, and whether their root is read-only."""


@dataclass(frozen=True)
class Store:
    """An S3 server of the stack.

    Attributes:
        name: Its name in the table.
        variables: For the compose files.
        files: Compose files beside the main one.
    """

    name: str
    variables: dict[str, str]
    files: tuple[str, ...] = ()


@dataclass
class Guide:
    """The stack with one S3 server.

    Attributes:
        store: The S3 server.
        data: Folder with `stage1_train.zip`, `my-images/` and perhaps encoder weights.
        folder: For the settings and the results.
        shell: Runs programs with the engine.
        protocol: Where the steps go.
    """

    store: Store
    data: Path
    folder: Path
    shell: Shell
    protocol: Protocol

    def walk(self) -> None:
        """All steps, and `down` whatever happens."""
        self._settings()
        with self.protocol.part():
            for name, act in self._steps():
                self._step(name, act)
        with self.protocol.part():
            self._step("down --volumes", self._down)

    def _steps(self) -> list[tuple[str, Callable[[], str]]]:
        return [
            ("without a password Compose stops", self._no_password),
            ("build", self._build),
            ("up --wait: store, bucket, Ray head healthy", self._up),
            ("read-only root, no capabilities, user, ports", self._hardened),
            ("dashboard asks for the token", self._token),
            ("doctor", self._doctor),
            ("data import", self._import),
            ("weights add", self._weights),
            ("train, two epochs", self._train),
            ("Ctrl-C leaves the job running", self._leave),
            ("stop saves a checkpoint", self._stop),
            ("up, submit --resume", self._resume),
            ("models pull", self._pull),
            ("predict", self._predict),
            ("evaluate", self._evaluate),
            ("nucleus:predict: pull, evaluate", self._evaluate_light),
            ("kill -9 of the head: restarted, healthy", self._kill_head),
            ("kill -9 of Ray's control process: restarted, healthy", self._kill_gcs),
            ("down, up: data and models are kept", self._again),
        ]

    def _step(self, name: str, act: Callable[[], str]) -> None:
        self.protocol.step(self.store.name, name, act)

    # --- the stack ---

    def _settings(self) -> None:
        results = self.folder / "results"
        results.mkdir(parents=True, exist_ok=True)
        os.chown(results, 1000, 1000)
        values = {
            "STORE_PASSWORD": os.urandom(20).hex(),
            "RAY_AUTH_TOKEN": os.urandom(32).hex(),
            "DATA": str(self.data),
            "RESULTS": str(results),
            "STORE_PORT": str(_STORE_PORT),
            "DASHBOARD_PORT": str(_DASHBOARD),
            **self.store.variables,
        }
        self.env.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
        self.env.chmod(0o600)

    @property
    def env(self) -> Path:
        """The file of settings, as `infra/local/.env`."""
        return self.folder / "env"

    def _compose(self, *words: str, env: Path | None = None) -> list[str]:
        files = [word for file in ("infra/local/compose.yaml", *self.store.files) for word in ("--file", file)]
        start = ["docker", "compose", "--project-name", _PROJECT, "--env-file", str(env or self.env), *files]
        return [*start, "--profile", "cpu", *words]

    def _dc(self, *words: str, **options: Any) -> str:
        return self.shell.run(*self._compose(*words), **options)

    def _nucleus(self, *words: str) -> str:
        return self._dc("run", "--rm", "-T", "nucleus", *words)

    def _runs(self) -> list[dict[str, Any]]:
        return list(json.loads(self._nucleus("runs", "list", "--json")))

    def _container(self, service: str) -> dict[str, Any]:
        identity = self._dc("ps", "--all", "--quiet", service).strip()
        return dict(self.shell.json("docker", "inspect", identity)[0])

    def _no_password(self) -> str:
        empty = self.folder / "empty"
        empty.write_text("")
        done = subprocess.run(
            self._compose("config", env=empty), env=self.shell.variables, cwd=self.shell.folder,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode == 0 or "infra/local/.env" not in done.stderr:
            raise StepError(f"no remark about .env: {done.stderr}")
        return "names infra/local/.env"

    def _build(self) -> str:
        self._dc("build", "--build-arg", f"BASE={BASE}", "nucleus")
        return "nucleus:train"

    def _up(self) -> str:
        self._dc("up", "--detach", "--wait", "ray-cpu")
        services = [self._container(name)["State"] for name in _HARDENED]
        if not all(state["Health"]["Status"] == "healthy" for state in services):
            raise StepError(f"not healthy: {services}")
        return "healthy"

    def _hardened(self) -> str:
        for service, read_only in _HARDENED.items():
            found = self._container(service)
            _expect(found["HostConfig"]["CapDrop"], ["ALL"], f"CapDrop of {service}")
            _expect(found["HostConfig"]["ReadonlyRootfs"], read_only, f"ReadonlyRootfs of {service}")
            bound = {port["HostIp"] for ports in found["NetworkSettings"]["Ports"].values() for port in ports or []}
            _expect(bound, {"127.0.0.1"}, f"addresses of {service}")
            status = (Path("/proc") / str(found["State"]["Pid"]) / "status").read_text()
            _expect(re.findall(r"^(?:CapEff|CapPrm|CapBnd):\s*0*(\w)$", status, re.M), ["0"] * 3, "capabilities")
            _expect(re.findall(r"^NoNewPrivs:\s*(\d)", status, re.M), ["1"], "NoNewPrivs")
            _expect(re.findall(r"^Uid:\s*(\d+)", status, re.M), ["1000"], f"user of {service}")
        refused = "! touch /file 2> /dev/null && ! touch /opt/nucleus/file 2> /dev/null"
        self._dc("run", "--rm", "-T", "--entrypoint", "sh", "nucleus", "-c", refused)
        return "as declared, seen in /proc"

    def _token(self) -> str:
        _expect(self._status_of({}), 401, "status without a token")
        token = dict(line.split("=", 1) for line in self.env.read_text().splitlines())["RAY_AUTH_TOKEN"]
        _expect(self._status_of({"Authorization": f"Bearer {token}"}), 200, "status with the token")
        if token in json.dumps(self._container("ray-cpu")):
            raise StepError("`docker inspect` shows the token")
        return "401 without, 200 with it; docker inspect does not show it"

    def _status_of(self, headers: dict[str, str]) -> int:
        request = urllib.request.Request(f"http://127.0.0.1:{_DASHBOARD}/api/jobs/", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def _doctor(self) -> str:
        report = json.loads(self._dc("exec", "-T", "ray-cpu", "nucleus", "doctor", "--json"))
        found = {finding["check"]: finding["state"] for finding in report}
        _expect((found["bucket"], found["conditional writes"]), ("ok", "ok"), "bucket and conditional writes")
        return f"conditional writes are honoured; {sum(state == 'ok' for state in found.values())} checks ok"

    # --- train and use ---

    def _import(self) -> str:
        printed = self._nucleus("data", "import", "/data/stage1_train.zip", "dsb2018")
        found = dict(re.findall(r"^(images|nuclei)\t(\d+)$", printed, re.M))
        return f"{found['images']} images, {found['nuclei']} nuclei"

    def _weights(self) -> str:
        files = sorted(self.data.glob("*.weights.h5"))
        if not files:
            return "left out: no file of weights here, the encoder starts at random"
        return self._nucleus("weights", "add", f"/data/{files[0].name}")

    def _submit(self, *words: str) -> list[str]:
        random = () if list(self.data.glob("*.weights.h5")) else _RANDOM
        return ["nucleus", "submit", "dsb2018-cpu", *_SMALL, *random, *words]

    def _train(self) -> str:
        # Two epochs learn little: without `gate.minimum` the gate would keep the alias.
        command = self._submit("--set", "optimizer.epochs=2", "--set", "gate.minimum=0.0")
        self._dc("run", "--rm", "-T", "train-cpu", *command)
        (run,) = self._runs()
        _expect((run["epochs"], run["state"]), (2, "published"), "epochs and state of the run")
        return f"{run['run']}: version {run['version']}"

    def _leave(self) -> str:
        """A terminal in which somebody presses Ctrl-C once the second run has finished an epoch, and then Enter."""
        # Without a validation before the end, only the notice of `stop` makes it save a checkpoint.
        recipe = self._submit("--set", "optimizer.epochs=30", "--set", "optimizer.validate_every=30")
        dialogue = [(r"epoch 2/30", b"\x03"), (r"detach or stop.*\[detach\]", b"\r")]
        code, text = _in_terminal(self._compose("run", "--rm", "train-cpu", *recipe), self.shell, dialogue)
        self.shell.keep(text)
        _expect(code, 130, "exit status")
        (job,) = [job for job in self._jobs() if job["status"] == "RUNNING"]
        return f"exit status {code}, job {job['job']} runs"

    def _jobs(self) -> list[dict[str, Any]]:
        return list(json.loads(self._dc("exec", "-T", "ray-cpu", "nucleus", "jobs", "list", "--json")))

    def _stop(self) -> str:
        self._dc("stop", "ray-cpu")
        saved = self._checkpoint()
        if saved is None:
            raise StepError("no checkpoint was saved")
        return f"{saved}, run {self._last_run()['state']}"

    def _checkpoint(self) -> str | None:
        """The address of the last checkpoint of the newest run."""
        shown = json.loads(self._nucleus("runs", "show", self._last_run()["run"], "--json"))
        place: str | None = shown["places"].get("last checkpoint")
        return place

    def _last_run(self) -> dict[str, Any]:
        return max(self._runs(), key=lambda run: str(run["begun"]))

    def _resume(self) -> str:
        before = self._last_run()
        self._dc("up", "--detach", "--wait", "ray-cpu")
        self._dc("run", "--rm", "-T", "train-cpu", "nucleus", "submit", "--resume", before["run"])
        after = self._last_run()
        _expect((after["run"], after["state"]), (before["run"], "published"), "the run")
        return f"{after['run']} went on to epoch {after['epochs']}, published {after['version']}"

    def _pull(self) -> str:
        self._nucleus("models", "pull", "dsb2018@production", "/results/model")
        return f"{len(list((self.folder / 'results' / 'model').iterdir()))} files"

    def _predict(self) -> str:
        words = ("predict", "/data/my-images", "--model", "dsb2018@production", "--out", "/results/found", "--json")
        return counted(json.loads(self._nucleus(*words)))

    def _evaluate(self) -> str:
        found = json.loads(self._nucleus("evaluate", "dsb2018@2", "dsb2018", "--json"))
        return f"{found['model']}, split {found['split']}"

    def _evaluate_light(self) -> str:
        """The image without TensorFlow, in the stack's network, with the store's key."""
        values = dict(line.split("=", 1) for line in self.env.read_text().splitlines())
        (self.folder / "store.env").write_text(
            "AWS_ENDPOINT_URL_S3=http://store:9000\nAWS_ACCESS_KEY_ID=nucleus\nAWS_REGION=us-east-1\n"
            f"AWS_SECRET_ACCESS_KEY={values['STORE_PASSWORD']}\nNUCLEUS_BUCKET=s3://nucleus\nXDG_CACHE_HOME=/tmp\n"
        )
        options = (*HARDENED, "--network", f"{_PROJECT}_default", "--env-file", self.folder / "store.env")
        run = ("docker", "run", "--rm", *options, "nucleus:predict")
        self.shell.run(*run, "models", "pull", "dsb2018@2", "/tmp/model")
        found = self.shell.json(*run, "evaluate", "dsb2018@2", "dsb2018", "--json")
        return f"{found['model']}, split {found['split']}"

    # --- failures ---

    def _kill_head(self) -> str:
        os.kill(self._container("ray-cpu")["State"]["Pid"], signal.SIGKILL)
        return self._restarted(1)

    def _kill_gcs(self) -> str:
        identity = self._container("ray-cpu")["Id"]
        listed = self.shell.run("docker", "top", identity, "-eo", "pid,comm")
        (pid,) = [int(line.split()[0]) for line in listed.splitlines() if line.split()[1] == "gcs_server"]
        os.kill(pid, signal.SIGKILL)
        return self._restarted(2)

    def _restarted(self, count: int) -> str:
        for _ in range(180):
            found = self._container("ray-cpu")
            if found["RestartCount"] >= count and found["State"].get("Health", {}).get("Status") == "healthy":
                return f"healthy again, restart {found['RestartCount']}"
            time.sleep(1)
        raise StepError(f"not healthy after 180 s: {found['RestartCount']} restarts, {found['State']}")

    def _again(self) -> str:
        self._dc("down")
        self._dc("up", "--detach", "--wait", "ray-cpu")
        listed = json.loads(self._nucleus("models", "list", "--json"))
        return f"{len(listed)} models"

    def _down(self) -> str:
        self._dc("down", "--volumes", "--remove-orphans")
        ours = f"label=com.docker.compose.project={_PROJECT}"
        left = self.shell.run("docker", "ps", "--all", "--quiet", "--filter", ours)
        left += self.shell.run("docker", "volume", "ls", "--quiet", "--filter", ours)
        _expect(left, "", "containers and volumes")
        return "nothing is left"


def _expect(found: object, wanted: object, what: str) -> None:
    if found != wanted:
        raise StepError(f"{what}: expected {wanted}, found {found}")


def _in_terminal(
    command: list[str], shell: Shell, dialogue: list[tuple[str, bytes]], timeout: float = 600
) -> tuple[int, str]:
    """Run a program in a terminal, type the keys whenever the output matches, and return exit status and output."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=shell.variables, cwd=shell.folder, start_new_session=True
    )
    os.close(slave)
    text, open_questions, end = "", list(dialogue), time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < end:
        if select.select([master], [], [], 0.5)[0]:
            with suppress(OSError):  # the other end was closed
                text += os.read(master, 65536).decode(errors="replace")
        if open_questions and re.search(open_questions[0][0], text):
            os.write(master, open_questions.pop(0)[1])
    os.close(master)
    if process.poll() is None:
        process.kill()
        waiting = open_questions[0][0] if open_questions else "its end"
        raise StepError(f"waited for {waiting}: {text[-1500:]}")
    return process.wait(), text
