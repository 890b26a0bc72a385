"""File system for Ray Train: the project's bucket as a pyarrow file system.

Ray's default, `pyarrow.fs.S3FileSystem`, gives up after three attempts within seconds, which ends a run when the server
restarts, and its pickle contains the access keys. This one repeats requests as the rest of this project does, and its
pickle contains only the bucket's name and the time limit.
"""

import io
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystemHandler, FileType, PyFileSystem

from nucleus.errors import AccessDeniedError, ObjectNotFoundError
from nucleus.storage.bucket import Bucket, StoredObject
from nucleus.storage.retries import set_storage_timeout
from nucleus.storage.uri import S3Uri

__all__ = ["run_storage"]


def run_storage(uri: S3Uri, timeout: float) -> PyFileSystem:
    """Return a file system whose paths are `bucket/key`.

    Args:
        uri: A URI in the bucket.
        timeout: Seconds for which each process that uses the file system repeats a failing request.
    """
    return PyFileSystem(_BucketHandler(uri.bucket, timeout))


class _Upload(io.BytesIO):
    """A buffer that is written to the bucket when it is closed."""

    def __init__(self, bucket: Bucket, key: str) -> None:
        super().__init__()
        self._bucket = bucket
        self._key = key

    def close(self) -> None:
        if self.closed:
            return
        data = self.getvalue()
        super().close()  # before the upload, so that the garbage collector does not repeat a failed one
        self._bucket.put(self._key, data)


class _BucketHandler(FileSystemHandler):
    """Handler of the file operations that Ray Train uses."""

    def __init__(self, bucket: str, timeout: float) -> None:
        self._name = bucket
        self._timeout = timeout
        self._bucket = Bucket(S3Uri(bucket))
        set_storage_timeout(timeout)

    def __reduce__(self) -> tuple[Any, ...]:
        return _BucketHandler, (self._name, self._timeout)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BucketHandler) and other._name == self._name

    def __hash__(self) -> int:
        return hash(self._name)

    def get_type_name(self) -> str:
        return "nucleus"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        return [self._info(path) for path in paths]

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        base = selector.base_dir.rstrip("/")
        found = self._below(base)
        if not found and not selector.allow_not_found:
            raise FileNotFoundError(base)
        files = {f"{self._name}/{item.key}": item for item in found}
        folders = {
            str(parent)
            for path in files
            for parent in PurePosixPath(path).parents
            if str(parent).startswith(f"{base}/")
        }
        infos = [_file_info(path, item) for path, item in files.items()]
        infos += [FileInfo(folder, FileType.Directory) for folder in sorted(folders)]
        if selector.recursive:
            return infos
        return [info for info in infos if str(PurePosixPath(info.path).parent) == base]

    def create_dir(self, path: str, recursive: bool) -> None:
        """Do nothing: a bucket has no folders."""

    def delete_dir(self, path: str) -> None:
        self.delete_dir_contents(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = True) -> None:  # noqa: ARG002
        for item in self._below(path):
            self._delete(item.key)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError

    def delete_file(self, path: str) -> None:
        self._delete(self._key(path))

    def move(self, src: str, dest: str) -> None:
        raise NotImplementedError

    def copy_file(self, src: str, dest: str) -> None:
        raise NotImplementedError

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        try:
            return pa.BufferReader(self._bucket.get(self._key(path)))
        except ObjectNotFoundError as error:
            raise FileNotFoundError(path) from error

    def open_output_stream(self, path: str, metadata: object) -> pa.NativeFile:  # noqa: ARG002
        return pa.PythonFile(_Upload(self._bucket, self._key(path)), mode="w")

    def open_append_stream(self, path: str, metadata: object) -> pa.NativeFile:
        raise NotImplementedError

    def _key(self, path: str) -> str:
        return path.removeprefix(f"{self._name}/").strip("/")

    def _below(self, path: str) -> list[StoredObject]:
        return list(self._bucket.objects(f"{self._key(path)}/"))

    def _info(self, path: str) -> FileInfo:
        key = self._key(path)
        file = self._bucket.find(key)
        if file is not None:
            return _file_info(path, file)
        if any(self._bucket.objects(f"{key}/")):
            return FileInfo(path, FileType.Directory)
        return FileInfo(path, FileType.NotFound)

    def _delete(self, key: str) -> None:
        try:
            self._bucket.delete(key)
        except AccessDeniedError:  # without the right to delete, old checkpoints stay
            return


def _file_info(path: str, item: StoredObject) -> FileInfo:
    return FileInfo(path, FileType.File, size=item.size, mtime=item.modified)
