"""Tracking never ends a run: where W&B's server cannot be used, the run goes on, and is tracked offline.

The server is asked once before the workers start. During the run, an error of W&B closes the online run and opens an
offline one on the same machine, with all metrics so far; the trainer notices nothing.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nucleus.errors import UsageError
from nucleus.lazy import wandb
from nucleus.surroundings import exempt_this_machine, export, proxy_advice
from nucleus.text import first_line

if TYPE_CHECKING:
    from nucleus.config.recipe import TrackingOptions
    from nucleus.predict.evaluation import PredictedImage
    from nucleus.tracking.wandb_run import WandbRun

__all__ = [
    "RunTracking",
    "check_tracking",
    "forget_unusable_address",
    "server_problem",
    "tracking_mode",
    "usable_mode",
]


_MODES = ("online", "offline", "disabled")
_ADDRESS_VARIABLE = "WANDB_BASE_URL"
_ADDRESS = "https://api.wandb.ai"
"""Address of W&B's server without WANDB_BASE_URL."""
_ATTEMPTS, _ANSWER_SECONDS, _PAUSE_SECONDS = 2, 5.0, 1.0
_LONGEST_ANSWER = 1 << 16
_REFUSED = (401, 403)
_SERVERS_FAULT = 500
_QUERY = json.dumps({"query": "query Viewer { viewer { id entity username } }"}).encode()
"""GraphQL query that W&B's own client sends to check a key."""


def tracking_mode(options: TrackingOptions) -> str:
    """Return the mode of WANDB_MODE, else that of the recipe. Raises `UsageError` for an unknown mode."""
    mode = os.environ.get("WANDB_MODE") or options.wandb
    if mode not in _MODES:
        raise UsageError(
            f"Expected WANDB_MODE to be one of {', '.join(_MODES)}; found {mode!r}. Run: "
            + export("WANDB_MODE", "offline")
        )
    return mode


def check_tracking(mode: str) -> None:
    """Raise `UsageError` if the mode is `online` and W&B has no API key."""
    if mode == "online" and _settings_problem() is None and not wandb.api.api_key:
        raise UsageError(
            "Expected a W&B key for tracking.wandb = 'online'; found none. Run: wandb login, set WANDB_API_KEY, or "
            "choose WANDB_MODE=offline."
        )


def usable_mode(mode: str, on_stage: Callable[[str], None], on_warning: Callable[[str], None]) -> str:
    """Return `offline` instead of `online` if W&B's server does not answer or refuses the key, with a warning.

    Args:
        mode: `online`, `offline` or `disabled`.
        on_stage: Called with a text before the server is asked, which takes seconds if it does not answer.
        on_warning: Called with the warning.
    """
    if mode != "online":
        return mode
    on_stage("Asking W&B's server whether it accepts the run")
    problem = server_problem()
    if problem is None:
        return mode
    on_warning(
        f"{problem} The run is tracked offline; its files are kept for wandb sync, and the command is shown at its end."
    )
    return "offline"


def server_problem() -> str | None:
    """Ask W&B's server whether it accepts this machine's key; return why not, or None if it does.

    A server that does not answer, or fails, is asked twice; an answer may take 5 s.
    """
    problem = _settings_problem()
    if problem is not None:
        return problem
    address, key = _address(), wandb.api.api_key
    if not key:  # a run that is resumed on another machine
        return "Expected a W&B key on this machine; found none. Run: wandb login, or set WANDB_API_KEY."
    exempt_this_machine()
    for attempt in range(_ATTEMPTS):
        problem, final = _ask(address, key)
        if final:
            break
        if attempt + 1 < _ATTEMPTS:
            time.sleep(_PAUSE_SECONDS)
    return f"Expected W&B's server at {address} to accept the run; {problem}" if problem else None


def _address() -> str:
    return (os.environ.get(_ADDRESS_VARIABLE) or str(wandb.setup().settings.base_url) or _ADDRESS).rstrip("/")


def _settings_problem() -> str | None:
    """Return why W&B's settings, of files and the environment, cannot be used; None if they can."""
    problem = _address_problem()
    if problem is None:
        try:
            wandb.setup()
        except Exception as error:  # pydantic's and others
            return f"Expected settings that W&B can use; W&B says: {first_line(error).rstrip('.')}."
    return problem


def _address_problem() -> str | None:
    """Return what is wrong with WANDB_BASE_URL; None if it is not set, or is the URL of a server."""
    given = os.environ.get(_ADDRESS_VARIABLE)
    if not given:
        return None
    try:
        parts = urlsplit(given)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # the port is not a number
        usable = False
    if usable:
        return None
    return f"Expected a URL such as {_ADDRESS} in {_ADDRESS_VARIABLE} for W&B; found {given!r}."


def forget_unusable_address() -> None:
    """Unset WANDB_BASE_URL in this process if it is not a URL: W&B would refuse even an offline run."""
    if _address_problem() is not None:
        del os.environ[_ADDRESS_VARIABLE]


def _ask(address: str, key: str) -> tuple[str | None, bool]:
    """Ask the server once; return why it cannot be used, or None, and whether asking again would be of no use."""
    token = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {token}"}
    request = urllib.request.Request(f"{address}/graphql", _QUERY, headers)  # noqa: S310  an HTTP URL
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as answer:  # noqa: S310 # nosec B310 - as above
            return _problem_of_answer(answer.read(_LONGEST_ANSWER)), True
    except urllib.error.HTTPError as error:
        if error.code in _REFUSED:
            return f"it refused the API key ({error.code}). Run: wandb login --relogin, or set WANDB_API_KEY.", True
        return f"it answered {error.code}.{proxy_advice(address)}", error.code < _SERVERS_FAULT
    except (OSError, http.client.HTTPException, ValueError) as error:  # such as a host name that is none
        reason = getattr(error, "reason", error)
        return f"it did not answer ({first_line(reason)}).{proxy_advice(address)}", False


def _problem_of_answer(body: bytes) -> str | None:
    try:
        viewer = json.loads(body)["data"]["viewer"]
    except (ValueError, KeyError, TypeError):
        return f"its answer is not one of W&B's. Check {_ADDRESS_VARIABLE}."
    return None if viewer else "it does not know the API key. Run: wandb login --relogin, or set WANDB_API_KEY."


class RunTracking:
    """The tracking of a run in W&B, on its first worker. No method raises an error of W&B.

    Args:
        open_run: Opens the run in W&B in a mode, `online` or `offline`.
        mode: Mode to begin with: `online`, `offline` or `disabled`.
        on_warning: Called with a text each time that the mode changes.

    Attributes:
        mode: `online` while W&B's server has, or will get, everything; `offline` if files are kept for `wandb sync`;
            `disabled` if nothing is tracked.
        run_path: Path of the run in W&B, `[entity/]project/id`; None if nothing is tracked.
    """

    def __init__(self, open_run: Callable[[str], WandbRun], mode: str, on_warning: Callable[[str], None]) -> None:
        self.mode = mode
        self.run_path: str | None = None
        self._open_run = open_run
        self._on_warning = on_warning
        self._run: WandbRun | None = None
        self._history: list[dict[str, float]] = []
        if mode != "disabled":
            self._open()

    @property
    def kept_files(self) -> dict[str, Path]:
        """Files that `wandb sync` needs, by name (`offline-run-.../...`); empty in online mode."""
        return self._run.kept_files if self._run is not None else {}

    def log(self, metrics: dict[str, float]) -> None:
        """Log the metrics of an epoch, including `epoch`."""
        self._history.append(metrics)
        self._do(lambda run: run.log(metrics))

    def predictions(self, epochs_done: int | None, images: Sequence[PredictedImage]) -> None:
        """Log predictions; see `WandbRun.predictions`."""
        self._do(lambda run: run.predictions(epochs_done, images))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary and close the run."""
        self._do(lambda run: self._note_unsent(run.finish(summary)))

    def abort(self) -> None:
        """Close the run as failed."""
        self._do(lambda run: self._note_unsent(run.abort()))

    def _note_unsent(self, problem: str | None) -> None:
        if problem is not None:
            self.mode = "offline"
            self._on_warning(f"{problem} What it lacks is kept for wandb sync.")

    def _do(self, action: Callable[[WandbRun], None]) -> None:
        """Do something with the run, if it is tracked; after an error, again with the run in the next mode."""
        while self._run is not None:
            try:
                action(self._run)
            except Exception as error:  # W&B's errors have no common class, and the run must go on
                self._fall_back(error)
            else:
                return

    def _open(self) -> None:
        try:
            self._run = self._open_run(self.mode)
            for metrics in self._history:
                self._run.log(metrics)
            self.run_path = self._run.run_path
        except Exception as error:  # as above
            self._fall_back(error)

    def _fall_back(self, error: Exception) -> None:
        """Go on offline after an error of an online run, without tracking after one of an offline run."""
        failed, self._run, self.run_path = self.mode, None, None
        self.mode = "offline" if failed == "online" else "disabled"
        cause = (first_line(error) or type(error).__name__).rstrip(".")
        then = "its files are kept for wandb sync" if self.mode == "offline" else "the run goes on without it"
        told = f"Expected W&B to track the run {failed}; it failed: {cause}. Tracking is {self.mode}: {then}."
        self._on_warning(told)
        if self.mode == "offline":
            _restart_service()
            self._open()


def _restart_service() -> None:
    """End W&B's process, which may hang or be dead, unless the user's program has an open run in it."""
    if wandb.run is None:
        with suppress(Exception, SystemExit):  # W&B exits with the status of its process
            wandb.teardown()
