"""Write the locks of every dependency, with hashes and without a registry's host: `make lock`.

Each file is what `pip install --require-hashes -r` needs for one kind of machine: `cpu` and `gpu` run the job,
`dev` is `cpu` with the embedded S3 server and the tools.
"""

import subprocess
import sys
from pathlib import Path

EXTRAS = {"cpu": ["cpu", "local"], "gpu": ["gpu"], "dev": ["cpu", "local", "dev"]}
ROOT = Path(__file__).resolve().parent.parent

for name, extras in EXTRAS.items():
    subprocess.run(  # noqa: S603
        [
            *(sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--upgrade"),
            *("--generate-hashes", "--no-emit-index-url", "--no-header", "--no-annotate"),
            *("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"),
            *(f"--extra={extra}" for extra in extras),
            *("--output-file", f"requirements/{name}.txt", "pyproject.toml"),
        ],
        cwd=ROOT,
        check=True,
    )
