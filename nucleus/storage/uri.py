"""S3 URIs: `s3://bucket/key` as a value, and the bucket of NUCLEUS_BUCKET."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from nucleus.errors import UriError
from nucleus.surroundings import export

__all__ = [
    "BUCKET_VARIABLE",
    "LONGEST_KEY",
    "S3Uri",
    "bucket_from_environment",
    "is_uri",
    "key_problem",
    "local_path",
    "parse_uri",
    "uri_or_path",
]

BUCKET_VARIABLE = "NUCLEUS_BUCKET"
"""Environment variable with the project's bucket."""
LONGEST_KEY = 1024
"""Bytes of a key, by S3's rules."""
_SCHEME = "s3"
_FIRST_PRINTABLE, _DELETE = 32, "\x7f"
_FORBIDDEN = re.compile(r'[\x00-\x1f<>:"|?*\\%]|^(con|prn|aux|nul|com\d|lpt\d)(?![^. ])|[. ]$', re.IGNORECASE)
"""What a file name cannot have on Windows: letters, names of devices, a dot or blank at the end; `%` marks them."""
_ODD_PARTS = {"": "an empty part (two slashes, or one at an end)", ".": "a part '.'", "..": "a part '..'"}


@dataclass(frozen=True)
class S3Uri:
    """A bucket and a key or prefix in it, without leading or trailing slashes.

    >>> str(S3Uri("cells", "datasets") / "dsb2018")
    's3://cells/datasets/dsb2018'
    """

    bucket: str
    key: str = ""

    def __truediv__(self, part: str) -> "S3Uri":
        part = part.strip("/")
        return S3Uri(self.bucket, f"{self.key}/{part}" if self.key else part)

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}" if self.key else f"s3://{self.bucket}"

    @property
    def parent(self) -> "S3Uri":
        """The prefix above this key; the bucket itself at the top."""
        return S3Uri(self.bucket, self.key.rpartition("/")[0])

    @property
    def name(self) -> str:
        """The part of the key after the last slash."""
        return self.key.rpartition("/")[2]


def is_uri(text: str) -> bool:
    """Return whether a text begins as a URI of S3; any other is a path, or a name."""
    return text.startswith(f"{_SCHEME}://")


def uri_or_path(text: str) -> S3Uri | Path:
    """Return the URI, or the path, that a text is.

    Raises:
        UriError: It begins with `s3://`, and is malformed.

    >>> uri_or_path("s3://cells/images"), uri_or_path("images").as_posix()
    (S3Uri(bucket='cells', key='images'), 'images')
    """
    return parse_uri(text) if is_uri(text) else Path(text)


def parse_uri(text: str) -> S3Uri:
    """Parse `s3://bucket[/key]`.

    Raises:
        UriError: Another scheme, or no bucket.
    """
    scheme, separator, rest = text.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != _SCHEME or not separator or not bucket:
        raise UriError(f"Expected s3://bucket[/prefix]; found {text!r}.")
    problem = key_problem(key.strip("/")) if key.strip("/") else None
    if problem is not None:
        raise UriError(f"Expected s3://bucket/prefix with a usable prefix; found {text!r}. {problem}.")
    return S3Uri(bucket, key.strip("/"))


def key_problem(key: str) -> str | None:
    """Return why an object below a prefix cannot be read by its key, or None.

    S3 allows any text as a key, but clients take a key for a path: they refuse such keys, or drop empty parts and
    resolve dots, and would read or replace another object.
    """
    for part in key.split("/"):
        if part in _ODD_PARTS:
            return f"Expected a key like a path; found {_ODD_PARTS[part]}"
    if any(ord(letter) < _FIRST_PRINTABLE or letter == _DELETE for letter in key):
        return "Expected a key of printable characters; found a control character, such as a line break or tab"
    return None


def local_path(uri: S3Uri) -> Path:
    """Return a relative path for what is kept of an object, with names that every operating system accepts.

    >>> local_path(S3Uri("cells", "models/aux/v:1")).as_posix()
    'cells/models/%61ux/v%3A1'
    """
    return Path(*(_FORBIDDEN.sub(_quoted, part) for part in (uri.bucket, *uri.key.split("/")) if part))


def _quoted(found: re.Match[str]) -> str:
    letter, rest = found[0][0], found[0][1:]
    return quote(letter, safe="") + rest if quote(letter, safe="") != letter else f"%{ord(letter):02X}{rest}"


def bucket_from_environment(given: str | None = None) -> S3Uri:
    """Return the project's bucket: `given` (from a recipe), else the variable NUCLEUS_BUCKET.

    Raises:
        UriError: Neither is set, or it is not an `s3://` URI.
    """
    text = given or os.environ.get(BUCKET_VARIABLE, "")
    if not text:
        raise UriError(
            f"Expected a bucket in {BUCKET_VARIABLE}; it is not set. Run: {export(BUCKET_VARIABLE, 's3://BUCKET')} "
            '(or, for a server on this machine: eval "$(nucleus store start)").'
        )
    return parse_uri(text)
