"""How a run is opened in W&B, the first time or again: nothing but what is ours to tell is told."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

from nucleus.config.recipe import TrackingOptions

__all__ = ["open_run", "staged_in"]

_DATA_DIR = "WANDB_DATA_DIR"


def open_run(
    run: str,
    options: TrackingOptions,
    mode: str,
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    group: str | None = None,
    commit: str | None = None,
    system: bool = True,
) -> Any:
    """Begin a run in W&B, or go on with it under the same id; return the `wandb.Run`.

    W&B learns packages and hardware, and of this process the program; never its arguments (Ray's hold a password), the
    environment, the code, or a clone that happens to be the current directory.

    Args:
        run: Its name and id.
        options: Project and entity.
        mode: `online` or `offline`.
        folder: W&B's files go to its folder `wandb`.
        config: What it is run with; None leaves that as it is.
        group: What it belongs to, such as a sweep.
        commit: Of this package's code.
        system: Whether the machine's load is recorded.
    """
    import wandb  # noqa: PLC0415  over half a second

    folder.mkdir(parents=True, exist_ok=True)
    with _without_arguments():
        return wandb.init(
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
            settings=wandb.Settings(
                console="off",
                silent=True,
                save_code=False,
                disable_code=True,
                disable_git=True,  # of the current directory, whose remote's address may hold a token
                git_commit=commit,
                x_disable_stats=not system,
            ),
        )


@contextmanager
def staged_in(folder: Path) -> Iterator[None]:
    """Let W&B keep copies of what artifacts hold in a folder, where an offline run needs them until it is sent."""
    before = os.environ.get(_DATA_DIR)
    os.environ[_DATA_DIR] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_DATA_DIR]
        else:
            os.environ[_DATA_DIR] = before


@contextmanager
def _without_arguments() -> Iterator[None]:
    """W&B records `sys.argv[1:]` and has no setting against it."""
    before = sys.argv
    sys.argv = before[:1]
    try:
        yield
    finally:
        sys.argv = before
