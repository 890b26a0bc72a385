"""`make bench`, or `python -m tests.benchmarks [NAME...]`: one JSON line a benchmark, each in a process of its own."""

import importlib
import os
import subprocess
import sys

# Benchmark: the module that holds a function of this name.
BENCHMARKS = {
    "help": "startup",
    "startup": "startup",
    "submit_start": "submit_start",
    "download_large": "download",
    "download_small": "download",
    "ingest_tfdata": "ingest",
    "ingest_raydata": "ingest_raydata",
    "ingest_cost": "ingest_cost",
    "step_rate": "step_rate",
    "step_settings": "step_rate",
    "step_profile": "step_rate",
    "epochs": "epochs",
    "scaling": "scaling",
    "memory_growth": "growth",
    "cost_per_image": "growth",
    "grouping": "million",
    "manifest_open": "million",
    "runs_list": "run_list",
    "checkpoint_overlap": "checkpoint_overlap",
    "predict_rate": "prediction",
    "large_image": "prediction",
    "outlines": "prediction",
    "zarr_rate": "prediction",
    "small_images": "prediction",
    "serve_load": "serve_load",
}


def main(names: list[str]) -> int:
    """Run the benchmarks of these names, or all; return the number that failed to run."""
    unknown = sorted(set(names) - BENCHMARKS.keys())
    if unknown:
        print(f"Expected names out of {', '.join(BENCHMARKS)}; found {', '.join(unknown)}.", file=sys.stderr)
        return 2
    if len(names) == 1:
        module = importlib.import_module(f"tests.benchmarks.{BENCHMARKS[names[0]]}")
        getattr(module, names[0])()
        return 0
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [sys.executable, "-m", "tests.benchmarks"]
    return sum(
        subprocess.run([*command, name], check=False, env=environment).returncode != 0 for name in names or BENCHMARKS
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
