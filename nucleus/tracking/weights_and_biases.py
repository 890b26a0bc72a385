"""Weights & Biases: the configuration and each epoch's metrics, by the first worker alone."""

import os
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, cast

from nucleus.config.recipe import TrackingOptions
from nucleus.errors import UsageError
from nucleus.tracking.offline_runs import logged_epochs, offline_files

__all__ = ["NoTracker", "Tracker", "WandbTracker", "check_tracking", "make_tracker", "tracking_mode"]

_MODES = ("online", "offline", "disabled")


class Tracker(Protocol):
    """What a worker tells about its run.

    Attributes:
        run_path: The run in W&B.
    """

    run_path: str | None

    @property
    def offline_files(self) -> list[Path]:
        """What `wandb sync` sends later, one file for each time that the run was begun here."""

    def log(self, metrics: dict[str, float]) -> None:
        """Metrics of an epoch; `epoch` is among them."""

    def finish(self, summary: dict[str, Any]) -> None:
        """The run is over."""

    def abort(self) -> None:
        """The run has failed."""


class NoTracker:
    """Tracks nothing."""

    run_path: str | None = None
    offline_files: ClassVar[list[Path]] = []

    def log(self, metrics: dict[str, float]) -> None:
        """Do nothing."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Do nothing."""

    def abort(self) -> None:
        """Do nothing."""


class WandbTracker:
    """One W&B run, continued under the same id when a run is resumed."""

    def __init__(
        self,
        run: str,
        options: TrackingOptions,
        mode: str,
        folder: Path,
        config: dict[str, Any],
        group: str | None,
    ) -> None:
        import wandb  # noqa: PLC0415  over a second

        folder.mkdir(parents=True, exist_ok=True)
        self._logged = logged_epochs(folder, run) if mode == "offline" else set()
        self._run = wandb.init(
            project=options.project,
            entity=options.entity,
            id=run,
            name=run,
            group=group,
            resume="allow",
            job_type="train",
            mode=cast(Literal["online", "offline"], mode),
            dir=str(folder),
            config=config,
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("epoch")
        self._run.define_metric("*", step_metric="epoch")
        if self._run.resumed and mode == "online":
            rows = wandb.Api().run(self._run.path).scan_history(keys=["epoch"])
            self._logged = {int(row["epoch"]) for row in rows}
        entity = f"{self._run.entity}/" if self._run.entity else ""
        self._offline = folder if mode == "offline" else None
        self.run_path: str | None = f"{entity}{self._run.project}/{self._run.id}"

    @property
    def offline_files(self) -> list[Path]:
        """What was not sent, by this process and those before it; nothing online."""
        return offline_files(self._offline, self._run.id) if self._offline else []

    def log(self, metrics: dict[str, float]) -> None:
        """Log one epoch, unless it was logged before the run was broken off after its last checkpoint."""
        if int(metrics["epoch"]) not in self._logged:
            self._logged.add(int(metrics["epoch"]))
            self._run.log(metrics)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary and close the run."""
        self._run.summary.update(summary)
        self._run.finish()

    def abort(self) -> None:
        """Close the run as failed."""
        self._run.finish(exit_code=1)


def tracking_mode(options: TrackingOptions) -> str:
    """The mode that is in force: WANDB_MODE, else the recipe's. Raises `UsageError` for an unknown one."""
    mode = os.environ.get("WANDB_MODE") or options.wandb
    if mode not in _MODES:
        raise UsageError(
            f"Expected WANDB_MODE to be one of {', '.join(_MODES)}; found {mode!r}. Run: export WANDB_MODE=offline"
        )
    return mode


def check_tracking(mode: str) -> None:
    """Raise `UsageError` if `online` has no key to work with."""
    if mode != "online":
        return
    import wandb  # noqa: PLC0415

    if not wandb.api.api_key:
        raise UsageError(
            "Expected a W&B key for tracking.wandb = 'online'; found none. Run: wandb login, set WANDB_API_KEY, or "
            "choose WANDB_MODE=offline."
        )


def make_tracker(
    run: str,
    options: TrackingOptions,
    mode: str,
    folder: Path,
    config: dict[str, Any],
    group: str | None = None,
) -> Tracker:
    """The tracker for a mode."""
    if mode == "disabled":
        return NoTracker()
    return WandbTracker(run, options, mode, folder, config, group)
