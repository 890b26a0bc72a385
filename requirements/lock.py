"""Write the locks of every dependency, with hashes and without a registry's host: `make lock`.

Each file is what `pip install --require-hashes -r` or `uv pip sync` needs, on any platform and any Python from 3.11
for which the packages exist: a line that differs has a marker. `predict` is the light install with the service and
its page; `train` and `train-gpu` run the job, `train` with the embedded S3 server too; `dev` is `train` with the tools.

Versions that are locked stay, unless `--upgrade` (or another flag of `uv pip compile`) is given.
"""

import subprocess
import sys
from pathlib import Path

EXTRAS = {
    "predict": ["serve"],
    "train": ["train", "local"],
    "train-gpu": ["train-gpu"],
    "dev": ["train", "local", "slides", "serve", "dev"],
}
ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Write every lock."""
    for name, extras in EXTRAS.items():
        subprocess.run(
            [
                *(sys.executable, "-m", "uv", "pip", "compile", "--quiet", *sys.argv[1:]),
                *("--generate-hashes", "--no-emit-index-url", "--no-header", "--no-annotate"),
                *("--universal", "--python-version", "3.11"),
                *(f"--extra={extra}" for extra in extras),
                *("--output-file", f"requirements/{name}.txt", "pyproject.toml"),
            ],
            cwd=ROOT,
            check=True,
        )


if __name__ == "__main__":
    main()
