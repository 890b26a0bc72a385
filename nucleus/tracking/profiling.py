"""A profile of a few steps by TensorFlow's profiler, for TensorBoard: where a step's time goes."""

from pathlib import Path

__all__ = ["WARM_UP_STEPS", "StepProfile"]

WARM_UP_STEPS = 10
"""Steps before it: the graph is compiled in the first, and caches fill."""


class StepProfile:
    """Records so many steps of a run's first epoch, driven by the calls of `nucleus.training.run.Reporter.steps`.

    It begins after the first call by which ten steps were taken, and ends with the call by which as many as asked for
    were recorded, or with the epoch, so that no validation is in it: where a call is for several steps, these numbers
    are rounded up to calls. If an epoch is over before ten steps, the next ones count too; if each epoch is one call,
    a whole epoch is recorded, with the validation before it. A process that goes on with a later epoch records nothing.

    Args:
        count: How many steps; 0 for no profile, which costs nothing.
        folder: Local folder of TensorBoard, which gets `plugins/profile/<time>/<machine>.xplane.pb`.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self._asked = count
        self._folder = folder
        self._last: tuple[int, int] | None = None
        self._seen = 0
        self._recorded: int | None = None

    def steps(self, epoch: int, done: int, total: int) -> None:
        """So many steps of an epoch are done, of so many."""
        if not self._asked:
            return
        if self._last is None and epoch:
            self._asked = 0
            return
        taken = done - self._last[1] if self._last and self._last[0] == epoch else done
        self._last = (epoch, done)
        if self._recorded is not None:
            self._recorded += taken
            if self._recorded >= self._asked or done == total:
                self.stop()
            return
        self._seen += taken
        if self._seen >= WARM_UP_STEPS and (done < total or taken == total):
            self._start()

    def stop(self) -> None:
        """End the profile if it is under way, as when the run ends or fails; afterwards there is none."""
        if self._recorded is not None:
            import tensorflow as tf  # noqa: PLC0415

            self._recorded = None
            tf.profiler.experimental.stop()
        self._asked = 0

    @property
    def files(self) -> dict[str, Path]:
        """Name below TensorBoard's folder, and file, of what was recorded and is written."""
        if self._recorded is not None:
            return {}
        found = sorted(path for path in (self._folder / "plugins" / "profile").rglob("*") if path.is_file())
        return {path.relative_to(self._folder).as_posix(): path for path in found}

    def _start(self) -> None:
        import tensorflow as tf  # noqa: PLC0415  of the worker, which has it

        self._folder.mkdir(parents=True, exist_ok=True)
        tf.profiler.experimental.start(str(self._folder))
        self._recorded = 0
