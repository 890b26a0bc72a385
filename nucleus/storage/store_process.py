"""Process of the embedded S3 server: ministack, changed so that all it acknowledges is on disk.

ministack by itself only logs a write that fails, keeps the object in memory and answers 200. Here such an error reaches
the client (status 507 if the disk is full), and memory is read again from disk. A file and the JSON file with its
metadata are replaced together, also if the process is killed in between. Settings of buckets are written at each change
instead of at the end; what ministack would keep in memory only is refused.
"""

import asyncio
import errno
import hashlib
import importlib
import inspect
import json
import logging
import os
import resource
import socket
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, NoReturn

from nucleus.errors import NucleusError, StoreServerError
from nucleus.lazy import pip_install
from nucleus.storage.claims import file_lock
from nucleus.storage.files import free_bytes, output_error

__all__ = ["serve_store"]

_LOG_BYTES = 1 << 20
_HOST = "127.0.0.1"
_LOCK_FILE = "serving.lock"
_RESERVE = 1 << 20
"""Bytes that stay free, so that a full store can still be started and emptied."""
_MOVE = "stop the server, move its folder, and start it with --dir"
_KEEP_ALIVE_SECONDS = 75
_ENVIRONMENT = {
    "SERVICES": "s3",
    "AUTH": "false",
    "IOT_MTLS_ENABLED": "0",
    "PERSIST_STATE": "0",  # done here, at each change
    "S3_PERSIST": "0",  # until this module has taken over
    "LOCALSTACK_PERSISTENCE": "0",
    "LOG_LEVEL": "WARNING",
}
_HEALTH, _ABOUT = "/_ministack/health", "/_nucleus"
_CLOSED = ("/_", "/v20180820/")
"""Beginnings of paths that are not of S3: one of them empties the server."""
_CHANGING = {"PUT", "POST", "DELETE"}
_FORGOTTEN = {"retention", "legal-hold", "object-lock", "restore"}
_FORGOTTEN_HEADER = "x-amz-object-lock-"
"""Requests and headers whose effect ministack keeps in memory only."""
_METADATA = ".meta.json"
_NEW_DATA, _NEW_METADATA, _COMMITTED = _NEW = ".data.tmp", ".metadata.tmp", ".commit.tmp"
"""Endings of temporary files: ministack gives no object's file a name that ends with `.tmp`, and ignores such files."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}

_PINNED = (
    "handle_request", "_dispatch", "_parse_bucket_key", "_error", "_create_bucket", "_delete_bucket", "_put_object",
    "_copy_object", "_delete_object", "_delete_objects", "_upload_part", "_complete_multipart_upload",
    "_persist_object", "_persist_delete_marker", "_persist_version_state", "_persist_displaced_version",
    "_delete_version_file", "_delete_persisted_object", "_delete_persisted_bucket", "_atomic_write",
    "_remove_key_files", "_read_body", "_version_body", "_object_meta_from_record", "_key_history_meta",
    "_object_disk_path", "_key_disk_path", "_other_key_disk_path", "_encoded_key_name", "_plain_path_key",
    "_load_persisted_data", "_load_persisted_account", "_load_persisted_bucket", "_persisted_key_files",
    "_load_persisted_history", "_load_persisted_delete_marker", "_record_object_version", "_record_delete_marker",
    "_create_multipart_upload", "_upload_part_copy", "_post_object", "get_state", "load_persisted_state",
)  # fmt: skip
"""Functions of ministack that are replaced, or whose behaviour is relied on."""
_DIGEST = "b8c2df3d7ddb655edd7f1214d23bd8fe9a7965fc2d55c479f2c5cfd730f68430"
"""SHA-256 of their source."""
_VERSION = "1.5.33"

_Answer = tuple[int, dict[str, str], bytes]
_log = logging.getLogger(__name__)


class _StrictLogger(logging.LoggerAdapter[logging.Logger]):
    """Logger of ministack's S3 that raises again what is only noted: failures to write, read, delete or load."""

    def warning(self, msg: object, *args: object, **options: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None:
            raise error
        super().warning(msg, *args, **options)


class _DurableStore:
    """ministack's S3, whose memory is always what a restart would find on disk.

    Args:
        s3: Its module, imported with S3_PERSIST=0.
        folder: Folder of the data.
    """

    def __init__(self, s3: Any, folder: Path) -> None:
        self._s3 = s3
        self._folder = folder
        self._data = folder / "s3"
        self._settings = folder / "state" / "s3.json"
        self._persistence = importlib.import_module("ministack.core.persistence")
        self._ministack: Callable[..., Awaitable[_Answer]] = s3.handle_request
        self._remove: Callable[[str | None], None] = s3._remove_key_files
        s3.S3_PERSIST, s3.DATA_DIR = True, str(self._data)
        s3.logger = _StrictLogger(s3.logger)
        s3.handle_request = self.handle
        s3._atomic_write = self._write
        s3._persist_object = self._persist
        s3._remove_key_files = self._remove_files
        self._recover()
        self._load()

    async def handle(
        self, method: str, path: str, headers: dict[str, str], body: bytes, query_params: dict[str, Any], *args: Any,
        **options: Any,
    ) -> _Answer:  # fmt: skip
        """Answer a request. Nothing else happens meanwhile: ministack does not wait for anything in it."""
        if method not in _CHANGING:
            try:
                return await self._ministack(method, path, headers, body, query_params, *args, **options)
            except OSError as error:
                return self._failure(error, "read")
        if _FORGOTTEN & set(query_params) or any(name.startswith(_FORGOTTEN_HEADER) for name in headers):
            text = "This server does not keep retention, legal holds or archives of objects."
            return self._error("NotImplemented", text, 501)
        try:
            if method != "DELETE":
                self._need_room(self._size(body, query_params), str(self._data))
        except OSError as error:
            return self._failure(error, "write")
        return await self._change(method, path, headers, body, query_params, *args, **options)

    async def _change(
        self, method: str, path: str, headers: dict[str, str], body: bytes, query_params: dict[str, Any], *args: Any,
        **options: Any,
    ) -> _Answer:  # fmt: skip
        """Answer a request that changes something; if it fails, memory is what the disk has."""
        uploads = dict(self._s3._multipart_uploads._data)
        try:
            answer = await self._ministack(method, path, headers, body, query_params, *args, **options)
            _, key = self._s3._parse_bucket_key(path, headers)
            if not key and "delete" not in query_params and answer[0] < 300:
                self._save_settings()
        except Exception as error:  # whatever it is, memory may now differ from the disk
            _log.warning("%s %s failed", method, path, exc_info=error)
            self._s3._multipart_uploads._data = uploads
            self._load_or_end()
            return self._failure(error, "write")
        return answer

    def _load_or_end(self) -> None:
        try:
            self._load()
        except Exception as error:  # without it, objects would seem to be gone
            _end("could not read its data again", error)

    def _size(self, body: bytes, query_params: dict[str, Any]) -> int:
        """Return how many bytes a request will need on disk: those of all parts so far, if it sends one."""
        upload = self._s3._multipart_uploads.get(self._s3._qp(query_params, "uploadId"))
        return len(body) + sum(int(part["size"]) for part in (upload["parts"].values() if upload else ()))

    def _need_room(self, size: int, path: str) -> None:
        """Raise `OSError` unless there is room for a number of bytes and the reserve."""
        free = free_bytes(self._folder)
        if free is not None and free < size + _RESERVE:
            needed = f"{os.strerror(errno.ENOSPC)} for {size:,} bytes and a reserve of {_RESERVE >> 20} MiB"
            raise OSError(errno.ENOSPC, needed, path)

    def _failure(self, error: Exception, doing: str) -> _Answer:
        """Return the answer to a request that failed: 507 if repeating it does not help, else 500."""
        if not isinstance(error, OSError):
            return self._error("InternalError", f"The S3 server failed: {error!r}. See its log.", 500)
        place = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else self._data
        if doing == "write" and error.errno in _FULL | _FORBIDDEN:
            code = "InsufficientStorage" if error.errno in _FULL else "StorageNotWritable"
            return self._error(code, f"Nothing was stored. {output_error(place, error, _MOVE)}", 507)
        text = f"The S3 server could not {doing} {place}: {error.strerror or error}. See the server's log."
        return self._error("InternalError", text, 500)

    def _error(self, code: str, text: str, status: int) -> _Answer:
        answer: _Answer = self._s3._error(code, text, status)
        return answer

    def _write(self, path: str, data: bytes | str, *, text: bool = False) -> None:  # noqa: ARG002  as in ministack
        """Write a file that nothing else belongs to, completely or not at all."""
        self._need_room(len(data), path)
        self._write_alone(path, data)

    def _write_alone(self, path: str, data: bytes | str) -> None:
        with _removed_on_failure(path):
            _write_synced(path + _NEW_DATA, data)
            Path(path + _NEW_DATA).replace(path)
        _sync_folder(path)

    def _persist(self, bucket: str, key: str, obj: dict[str, Any]) -> None:
        """Replace the file of an object and the file of its metadata, both or none."""
        path: str = self._s3._object_disk_path(bucket, key)
        self._make_folder(Path(path).parent)
        metadata = {**self._s3._object_meta_from_record(obj), **self._s3._key_history_meta(bucket, key), "key": key}
        if obj.get("body") is None:
            self._write(path + _METADATA, json.dumps(metadata))
        else:
            self._need_room(len(obj["body"]), path)
            with _removed_on_failure(path):
                _write_synced(path + _NEW_DATA, obj["body"])
                _write_synced(path + _NEW_METADATA, json.dumps(metadata))
                Path(path + _NEW_METADATA).replace(path + _COMMITTED)  # from here on, `_recover` would finish
            self._finish(path)
        obj["body"] = None  # it is read from disk
        place = str(self._data / self._s3.get_account_id() / bucket)
        self._remove_files(self._s3._other_key_disk_path(place, key, path))

    def _finish(self, path: str) -> None:
        """Put the new files of an object in place; end the process if that fails: the next one does it."""
        try:
            _sync_folder(path)
            if Path(path + _NEW_DATA).exists():
                Path(path + _NEW_DATA).replace(path)
            Path(path + _COMMITTED).replace(path + _METADATA)
            _sync_folder(path)
        except OSError as error:
            _end(f"could not put {path} in place", error)

    def _make_folder(self, folder: Path) -> None:
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for place in missing:
            _sync_folder(str(place))

    def _remove_files(self, path: str | None) -> None:
        self._remove(path)
        if path and Path(path).parent.is_dir():
            _sync_folder(path)

    def _recover(self) -> None:
        """Finish writes that a killed process had committed, and remove what is left of others."""
        left = [path for path in _files(self._data) if path.name.endswith(_NEW)]
        for path in left:
            if path.name.endswith(_COMMITTED):
                self._finish(str(path).removesuffix(_COMMITTED))
        for path in left:
            path.unlink(missing_ok=True)

    def _load(self) -> None:
        """Read everything but uploads in progress from disk."""
        s3 = self._s3
        kept = (s3._buckets, s3._object_versions, s3._object_tags, s3._object_acl, s3._object_annotations)
        for stored in (*kept, *s3._PERSISTED_BUCKET_DICTS.values()):
            stored._data.clear()
        s3._load_persisted_data()
        try:
            found = json.loads(self._settings.read_bytes(), object_hook=self._persistence._json_object_hook)
            s3.load_persisted_state(found.get("payload", found))
        except FileNotFoundError:  # no bucket was made yet, or an older version was killed
            pass
        except (ValueError, AttributeError, TypeError) as error:
            raise StoreServerError(
                f"Expected the settings of buckets in {self._settings}; they are damaged. Remove this file: objects "
                "stay, and empty buckets and settings (such as a lifecycle) have to be made again."
            ) from error

    def _save_settings(self) -> None:
        """Write the list of buckets and their settings, in ministack's own format."""
        self._make_folder(self._settings.parent)
        version = self._persistence._state_format_version("s3")
        document = {"__ministack_format__": version, "payload": self._s3.get_state()}
        text = json.dumps(document, default=self._persistence._json_default)
        self._write_alone(str(self._settings), text)  # into the reserve too: a bucket may have been removed


def _files(folder: Path) -> Iterable[Path]:
    """Yield the files below a folder. Raises `OSError` if a part of it cannot be read."""

    def fail(error: OSError) -> NoReturn:
        raise error

    for base, _, names in os.walk(folder, onerror=fail) if folder.exists() else ():
        yield from (Path(base) / name for name in names)


def _write_synced(path: str, data: bytes | str) -> None:
    """Write a file to the disk itself. Errors have its path."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error


@contextmanager
def _removed_on_failure(path: str) -> Iterator[None]:
    """Remove the temporary files of an object if the block fails: they would fill the disk."""
    try:
        yield
    except BaseException:
        for ending in _NEW:
            with suppress(OSError):
                Path(path + ending).unlink()
        raise


def _sync_folder(path: str) -> None:
    """Write the names in the folder of a file to the disk itself."""
    descriptor = os.open(Path(path).parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _end(what: str, error: Exception) -> NoReturn:
    _log.critical("The server ends: it %s.", what, exc_info=error)
    logging.shutdown()
    os._exit(1)


def _check_ministack(s3: Any) -> None:
    """Raise `StoreServerError` unless ministack's functions are those that this module was written for."""
    try:
        source = "".join(inspect.getsource(getattr(s3, name)) for name in _PINNED)
    except (AttributeError, OSError):
        source = ""
    if hashlib.sha256(source.encode()).hexdigest() != _DIGEST:
        found = importlib.import_module("importlib.metadata").version("ministack")
        raise StoreServerError(
            f"Expected ministack {_VERSION}, whose way to store objects is known; found version {found}, which stores "
            f"them in another way and might lose some. Run: {pip_install(f'ministack=={_VERSION}')}"
        )


def _settled_environment() -> None:
    """Set the variables that ministack reads when it is imported, whatever the user's are."""
    os.environ.update(_ENVIRONMENT)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _log_to(file: Path) -> None:
    """Write warnings to the log, which keeps at most two files of 1 MiB; on a full disk they are lost."""
    handler = RotatingFileHandler(file, maxBytes=_LOG_BYTES, backupCount=1, delay=True)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(asctime)s %(levelname)s %(message)s")
    logging.raiseExceptions = False


def _application(app: Callable[..., Awaitable[None]], folder: Path) -> Callable[..., Awaitable[None]]:
    """Return ministack's application without what is not S3, and with the path of the data."""

    async def answer(scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        path = scope.get("path", "")
        if scope["type"] == "lifespan":  # ministack's would start its other services
            for event in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{event}.complete"})
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif path == _HEALTH or not path.startswith(_CLOSED):
            await app(scope, receive, send)
        else:
            about = json.dumps({"folder": str(folder)}).encode() if path == _ABOUT else b""
            await send({"type": "http.response.start", "status": 200 if about else 404, "headers": []})
            await send({"type": "http.response.body", "body": about})

    return answer


def _serve(folder: Path, log: Path, port: int) -> None:
    from hypercorn.asyncio import serve  # noqa: PLC0415  a dependency of ministack, which is optional
    from hypercorn.config import Config  # noqa: PLC0415

    _settled_environment()
    _log_to(log)
    s3 = importlib.import_module("ministack.services.s3")
    _check_ministack(s3)
    _DurableStore(s3, folder)
    application = _application(importlib.import_module("ministack.app").app, folder)
    with socket.create_server((_HOST, port)) as listening:
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as hypercorn does with its own
        config = Config()
        config.bind = [f"fd://{os.dup(listening.fileno())}"]
        config.keep_alive_timeout = _KEEP_ALIVE_SECONDS
        config.errorlog = logging.getLogger("hypercorn.error")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # from here on, errors concern requests
        asyncio.run(serve(application, config))


def serve_store(folder: str, log: str, port: str) -> None:
    """Serve the data in a folder on 127.0.0.1 until SIGTERM; what prevents the start is written to stdout.

    Args:
        folder: Folder of the data; one process at a time serves it.
        log: File of its log.
        port: A free port.
    """
    try:
        with file_lock(Path(folder) / _LOCK_FILE, _MOVE, wait=False):
            _serve(Path(folder), Path(log), int(port))
    except BlockingIOError:
        problem = (
            f"Expected no other server for {folder}; one is running, perhaps in another container, or its store.json "
            "was removed. Stop it first."
        )
    except OSError as error:
        named = isinstance(error.filename, str)
        problem = str(output_error(Path(error.filename), error, _MOVE) if named else error)
    except NucleusError as error:
        problem = str(error)
    else:
        return
    sys.stdout.write(problem)
    sys.stdout.flush()
    os._exit(1)
