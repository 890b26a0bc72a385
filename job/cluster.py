"""Connection to a Ray cluster: that of RAY_ADDRESS, one on this machine, or a new one; and whether it is lost."""

import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from types import FrameType
from typing import Any

import psutil
import tenacity

import job
from job.capacity import capacities, check_capacity
from nucleus.config.recipe import Recipe
from nucleus.errors import ClusterError, JobError, NucleusError
from nucleus.lazy import stderr_without
from nucleus.surroundings import provide_folders
from nucleus.text import first_line

__all__ = [
    "address_at_hand",
    "check_temporary_folder",
    "connected",
    "connection",
    "lost_cluster",
    "wait_for_certainty",
]

_ADDRESS, _FOLDER = "RAY_ADDRESS", "RAY_TMPDIR"
_CLIENT = "ray://"
_ANSWER_SECONDS = 5.0
"""Seconds to wait for a server to accept a connection."""
_START_SECONDS, _NOTE_SECONDS, _STARTS = 180.0, 20.0, 3
"""Longest wait for a cluster on this machine to start, the wait after which a note says so, and number of tries."""
_LONGEST_SOCKET_PATH = 107
"""Bytes in the path of a Unix socket, by the kernel's rules."""
_PROBE_BYTES, _FREE_BYTES = 1 << 16, 64 << 20
"""Bytes that are written to Ray's folder to see whether that works, and those that must be free there."""
_WATCH_SECONDS = 1.0
"""Seconds between two looks at a cluster."""
_LOOKS = 40
"""Looks at a cluster that may be lost, which takes longer than any of its servers may be silent."""
_REMARK = rb"Set ray log level from environment variable"
"""Beginning of a line of Ray that is not shown."""


@contextmanager
def connected(recipe: Recipe, *, own: bool, verbose: bool) -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS, else to one on this machine, else to a new one, within the block.

    With `own`, a new cluster that is large enough for the recipe is started, unless this process is already connected.

    Raises:
        JobError: The recipe needs more than the cluster has.
    """
    wanted = recipe.workers.most * recipe.cpus_per_worker if own else None
    with connection(own_cpus=wanted, verbose=verbose):
        check_capacity(recipe, capacities())
        with _address_known():
            yield


@contextmanager
def connection(*, own_cpus: int | None = None, verbose: bool = False) -> Iterator[None]:
    """Use the existing connection of this process; else connect to RAY_ADDRESS, this machine's cluster or a new one.

    Args:
        own_cpus: Start a new cluster on this machine even if another one is available, with at least this number of
            CPUs, even if the machine has fewer.
        verbose: Whether to show Ray's logs.

    Raises:
        JobError: Ray cannot be reached or started, or fails within the block; the message has the last cause.
        ClusterError: The cluster is lost within the block.
    """
    import ray

    provide_folders()  # Ray and what it starts look into the home folder
    with redirect_stdout(sys.stderr), _explained():  # Ray prints warnings of the machines to stdout, for results
        if ray.is_initialized():
            yield
            return
        with stderr_without(_REMARK) as shown:
            _connect(own_cpus, shown, verbose=verbose)
        try:
            with nullcontext() if verbose else job.without_state_dumps(), _left_if_lost():
                yield
        finally:
            job.disconnect(lost=lost_cluster() is not None)
            _watch.lost = None


@contextmanager
def _explained() -> Iterator[None]:
    """Replace errors of Ray by the error of this project that they wrap, else by a `JobError` with their last cause."""
    try:
        yield
    except NucleusError:
        raise
    except Exception as error:
        if not job.is_from_ray(error):
            raise
        raise job.our_error(error) or JobError(
            f"Expected Ray to do its work; it failed: {job.failure_text(error)}. To see logs, use --debug."
        ) from error


def _connect(own_cpus: int | None, shown: int, *, verbose: bool) -> None:
    """Join a cluster or start one; `shown` is the file descriptor for a note that it takes long."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not sys.stderr.isatty():  # no codes of colours in the log of a job, or in a file
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    quiet = {"log_to_driver": verbose, "logging_level": "info" if verbose else "error"}
    if own_cpus is not None:
        _start(shown, num_cpus=max(own_cpus, os.cpu_count() or 1), **quiet)
    elif not _joined(quiet):
        _start(shown, **quiet)


def _start(shown: int, **settings: Any) -> None:
    """Start a cluster on this machine, without a dashboard.

    Ray's node ends if its agent takes 15 s to start, as on a busy machine; the start is then tried again.

    Args:
        shown: File descriptor for the note that the start takes more than 20 s.
        settings: Of `ray.init`.

    Raises:
        JobError: The cluster did not start within 180 s, or three times.
    """
    import ray

    check_temporary_folder()
    text = f"Note: Ray takes long to start (is this machine busy?); waiting up to {_START_SECONDS:.0f} s\n".encode()
    note = threading.Timer(_NOTE_SECONDS, os.write, (shown, text))
    note.start()
    before = psutil.Process().children()
    try:
        with job.patient_start(_START_SECONDS), job.shielded_start():
            late = tenacity.retry_if_exception_message(match=".*timed out during startup")
            again = tenacity.Retrying(retry=late, stop=tenacity.stop_after_attempt(_STARTS), reraise=True)
            again.before_sleep = lambda _: job.end_started_processes(before)
            again(ray.init, address="local", include_dashboard=False, job_config=job.worker_paths(), **settings)
    except BaseException as error:  # Ray raises plain `Exception`s, and those of the system; a signal interrupts it
        job.end_started_processes(before)
        if not isinstance(error, Exception):
            raise
        raise JobError(
            f"Expected Ray to start on this machine, and waited up to {_START_SECONDS:.0f} s; it did not: "
            f"{job.failure_text(error)}. Try again when the machine is less busy and has free memory; set {_FOLDER} "
            f"to a folder with a short path on a local disk with space (now {job.temporary_folder().parent}); or use a "
            f"running cluster with {_ADDRESS}=HOST:6379."
        ) from error
    finally:
        note.cancel()
        note.join()


def check_temporary_folder() -> None:
    """Check that Ray can keep its sockets and logs on this machine.

    Raises:
        JobError: The folder's path is too long for sockets, it cannot be written, or its disk is full.
    """
    folder = job.temporary_folder()
    change = f"Set {_FOLDER} to another folder on a local disk, such as: export {_FOLDER}=/var/tmp/ray-$USER"
    length = job.socket_path_length(folder)
    if length > _LONGEST_SOCKET_PATH:
        raise JobError(
            f"Expected a short path for Ray's sockets; {folder} is {length - _LONGEST_SOCKET_PATH} characters too long "
            f"(from {_folder_source()}). {change}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
        with suppress(PermissionError):  # as Ray does, for other users of this machine
            folder.chmod(0o777)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise JobError(
            f"Expected to write to Ray's folder {folder} (from {_folder_source()}): {first_line(error)}. {change}"
        ) from error
    if free < _FREE_BYTES:
        raise JobError(
            f"Expected {_FREE_BYTES >> 20} MiB of free space for Ray's sockets and logs in {folder} (from "
            f"{_folder_source()}); found {free >> 20} MiB. Make room, or use another disk. {change}"
        )


def _folder_source() -> str:
    """Return what decides Ray's folder: a variable, or Ray's default."""
    return next((name for name in (_FOLDER, "TMPDIR") if name in os.environ), "Ray's default")


class _Watch:
    """Watches the cluster of this process from a thread, because Ray itself waits for a lost one for minutes.

    Attributes:
        lost: Why the cluster is lost, in words; None while it is not.
    """

    def __init__(self) -> None:
        self.lost: str | None = None
        self._over = threading.Event()

    def start(self) -> None:
        """Watch from now on; interrupt the main thread if the cluster is lost."""
        self.lost, self._over = None, threading.Event()
        threading.Thread(target=self._watch, args=(self._over,), name="cluster-watch", daemon=True).start()

    def stop(self) -> None:
        """Watch no longer."""
        self._over.set()

    def _watch(self, over: threading.Event) -> None:
        patience = _Patience(job.connected_addresses())
        while not over.wait(_WATCH_SECONDS):
            self.lost = job.ended_process() or patience.lost()
            if self.lost is not None:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return


_watch = _Watch()


def lost_cluster() -> str | None:
    """Return why the cluster of this process is lost, in words; None if it is not known to be."""
    return _watch.lost or job.ended_process()


def wait_for_certainty() -> None:
    """Wait, if a server of the cluster is silent, until it answers or the cluster counts as lost.

    Ray's errors come earlier, and tell less: an actor has died.

    Raises:
        KeyboardInterrupt: The cluster is lost.
    """
    servers = job.connected_addresses().values()
    for _ in range(_LOOKS):
        if _watch.lost is not None or all(_accepts((host, port)) for host, port, _ in servers):
            return
        time.sleep(_WATCH_SECONDS)


@contextmanager
def _left_if_lost() -> Iterator[None]:
    """Watch the cluster within the block. Raises `ClusterError` as soon as it is lost, in the main thread."""
    with _heard():
        _watch.start()
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            lost = lost_cluster()
            if lost is None or isinstance(error, NucleusError):
                raise
            raise ClusterError(f"Expected the Ray cluster to stay; it is lost: {lost}.") from error
        finally:
            _watch.stop()


@contextmanager
def _heard() -> Iterator[None]:
    """Let SIGINT of `_Watch` interrupt the main thread even if this process was started to ignore it."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        if _watch.lost is not None:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Patience:
    """Asks servers whether they accept connections, and gives them time to come back.

    Args:
        addresses: Host and port of each server, and seconds for which it may be silent, by what it is in words.
    """

    def __init__(self, addresses: Mapping[str, tuple[str, int, float]]) -> None:
        self._addresses = addresses
        self._since: dict[str, float] = {}

    def lost(self) -> str | None:
        """Return which server has been silent for too long, in words; None if none has."""
        for name, (host, port, seconds) in self._addresses.items():
            if _accepts((host, port)):
                self._since.pop(name, None)
                continue
            now = time.monotonic()
            since = self._since.setdefault(name, now)
            if now - since >= seconds:
                return f"{name} has not answered for {seconds:.0f} s; its process or its machine is gone"
        return None


def _accepts(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, _ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


@contextmanager
def _address_known() -> Iterator[None]:
    """Set RAY_ADDRESS to this cluster for the actors of Ray Train, for the duration of the block.

    The actor that cleans up after a dead controller queries the cluster of RAY_ADDRESS, else the last one started on
    its machine. A different cluster does not know the controller, so the actor would end the run.
    """
    import ray

    job.pass_to_controller(_ADDRESS)
    if ray.util.client.ray.is_connected():  # by ray://, the value that RAY_ADDRESS already has
        yield
        return
    before = os.environ.get(_ADDRESS)
    os.environ[_ADDRESS] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ADDRESS]
        else:
            os.environ[_ADDRESS] = before


def _joined(settings: dict[str, Any]) -> bool:
    """Connect to the cluster of RAY_ADDRESS, or to one on this machine; return whether there is one."""
    import ray

    address = address_at_hand()
    if address is None:
        return False
    if not address.startswith(_CLIENT):
        settings = {**settings, "job_config": job.worker_paths()}
    try:
        with job.shielded_start():  # starts nothing here; this process keeps its handlers of signals
            ray.init(address=address, **settings)
    except Exception as error:  # Ray raises plain `Exception`s too
        raise JobError(
            f"Expected to connect to the Ray cluster at {address}; that failed, perhaps because of its token: "
            f"{job.failure_text(error)}. To find the cause, run: nucleus doctor. For a cluster on this machine, set "
            f"{_ADDRESS}=local."
        ) from error
    return True


def address_at_hand() -> str | None:
    """Return the address of the cluster of RAY_ADDRESS, or of one on this machine, without connecting to it.

    None means that a run starts a cluster of its own: there is none, or RAY_ADDRESS is `local`.

    Raises:
        JobError: No cluster answers at RAY_ADDRESS.
    """
    address = os.environ.get(_ADDRESS)
    if address == "local":
        return None
    if address in {None, "", "auto"}:
        return next(filter(_answers, job.local_addresses()), None)
    if not _answers(address):
        raise JobError(
            f"Expected a Ray cluster at RAY_ADDRESS={address}; none answers. Start it, or unset RAY_ADDRESS to use "
            "this machine."
        )
    return address


def _answers(address: str) -> bool:
    """Whether a server listens at `[ray://]host:port`. Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():  # Ray itself reports a wrong one
        return True
    return _accepts((host.strip("[]"), int(port)))
