"""Leaves out of the installed packages what no program of the image uses: `python slim.py EXTRA SITE_PACKAGES`.

Run by the Dockerfile after the packages are installed. Nothing here changes what a program computes: tests, headers and
symbol tables are not read at run time, and the other files belong to functions that the image does not have (see
docs/infra/image.md). `make containers` predicts, evaluates and trains with the result.
"""

import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["slim"]

FOLDERS = ["**/tests", "*/include", "numpy/_core/include", "ray/jars", "ray/rllib", "onnxruntime/transformers", "clang"]
"""Left out of every image: tests, headers, Ray for Java and for reinforcement learning, converters, a C compiler."""
FILES = [
    *("**/*.a", "**/*.h", "**/*.hpp", "**/*.pxd", "**/*.pyx"),
    "onnxruntime/capi/libonnxruntime.so.*",  # its Python module contains it; this one is for programs in C
    *("skimage/data/*.*g", "skimage/data/*.tif", "skimage/data/*.np?"),  # sample pictures
]
"""Single files that are left out of every image."""
PREDICT_FOLDERS = [
    *(
        "PIL",
        "pillow-*",
        "pillow.libs",
        "imageio",
        "imageio-*",
        "networkx",
        "networkx-*",
    ),  # scikit-image's files, graphs
    *("pygments", "pygments-*"),  # with which rich colours source code
    *("scipy/stats", "scipy/odr", "skimage/feature"),  # which no function that is called here imports
    *("onnxruntime/quantization", "onnxruntime/tools"),  # to convert models
]
"""What only the predict image leaves out; it reads and writes images with OpenCV, tifffile and imagecodecs."""
AWS = {"s3", "sts", "sso", "sso-oidc", "signin"}
"""The services of AWS that the predict image knows: objects, and the ways to get credentials for them."""

_LOAD, _PAGE = 1, 4096


def slim(extra: str, site: Path) -> int:
    """Remove what is not needed and strip what stays.

    Args:
        extra: The kind of image: `predict`, `train` or `train-gpu`.
        site: The folder `site-packages`.

    Returns:
        The bytes that this saved.
    """
    before = _size(site)
    for path in _unneeded(extra, site):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in _shared_objects(site):
        _strip(path)
    return before - _size(site)


def _unneeded(extra: str, site: Path) -> Iterator[Path]:
    patterns = [*FOLDERS, *FILES, *(PREDICT_FOLDERS if extra == "predict" else [])]
    for pattern in patterns:
        yield from list(site.glob(pattern))
    if extra == "predict":
        yield from [folder for folder in (site / "botocore" / "data").glob("*/") if folder.name not in AWS]


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def _shared_objects(site: Path) -> list[Path]:
    files = [path for path in site.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if _begins(path) == b"\x7fELF"]


def _begins(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)


def _strip(path: Path) -> None:
    """Drop the symbol table, unless `strip` cannot write the file in a form that the loader accepts."""
    new = path.with_name(path.name + ".stripped")
    done = subprocess.run(["strip", "--strip-unneeded", "-o", new, path], capture_output=True, check=False)  # noqa: S603, S607
    if done.returncode == 0 and _is_loadable(new):
        new.chmod(path.stat().st_mode)
        new.replace(path)
    else:
        new.unlink(missing_ok=True)


def _is_loadable(path: Path) -> bool:
    """Whether each segment begins at a page, as the loader asks; `strip` breaks this in files that patchelf changed."""
    with path.open("rb") as file:
        head = file.read(64)
        (start,) = struct.unpack_from("<Q", head, 32)
        size, count = struct.unpack_from("<HH", head, 54)
        file.seek(start)
        table = file.read(size * count)
    segments = [struct.unpack_from("<IIQQ", table, size * number) for number in range(count)]
    return all((offset - address) % _PAGE == 0 for kind, _, offset, address in segments if kind == _LOAD)


if __name__ == "__main__":
    saved = slim(sys.argv[1], Path(sys.argv[2]))
    print(f"saved {saved / 1e6:.0f} MB")  # noqa: T201
