"""`make containers`: docs/infra/local.md on a real Docker Engine, with two S3 servers. Root, on Debian."""

import os
import sys
import time
from pathlib import Path

from tests.containers.engine import DEBIAN, GO_PROGRAMS, Engine
from tests.containers.guide import Guide, Store
from tests.containers.images import Images, PredictImage
from tests.containers.report import write_report
from tests.containers.steps import Protocol, Shell

ROOT = Path(__file__).parents[2]
STORES = (
    Store("MinIO", {"MINIO_IMAGE": "minio-local"}),
    Store("Versity S3 Gateway", {}, ("tests/containers/compose.versitygw.yaml",)),
)


def announce(folder: Path) -> None:
    """Say what will be installed, before it is."""
    programs = ", ".join(f"{name} ({module})" for name, (module, _) in GO_PROGRAMS.items())
    print("Installs, unless it is there already:")
    print(f"  with apt-get: {', '.join(DEBIAN)}")
    print(f"  with go, into {folder}: {programs}")
    print(f"Starts dockerd with its data in {folder}, and stops it at the end. Output: {folder}/log.\n", flush=True)


def check(folder: Path, protocol: Protocol) -> None:
    """All parts; one that fails ends itself only, except for the tools and the images, which all others need."""
    run = folder / f"run-{time.strftime('%Y%m%d-%H%M%S')}"
    run.mkdir(parents=True)
    shell = Shell(folder / "log", {}, ROOT)
    engine = Engine(folder, shell, protocol)
    try:
        with protocol.part():
            engine.prepare()
            Images(run / "data", shell, protocol).prepare()
            for store in STORES:
                Guide(store, run / "data", run / store.name.split()[0].lower(), shell, protocol).walk()
            PredictImage(run / "data", run / "minio" / "results" / "model", shell, protocol).check()
    finally:
        engine.stop()


def main(folder: Path) -> int:
    """Check everything, print the table and write it into the documents."""
    if os.geteuid() != 0 or not Path("/etc/debian_version").exists():
        print("Expected root on Debian: this installs packages and starts a Docker Engine.", file=sys.stderr)
        return 2
    announce(folder)
    protocol = Protocol()
    check(folder, protocol)
    print("\n" + "\n".join(map(str, protocol.lines)))
    write_report(protocol, ROOT / "docs" / "infra" / "containers.md")
    return 0 if protocol.ok else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
