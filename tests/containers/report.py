"""docs/infra/containers.md: the last result of the container check."""

from datetime import UTC, datetime
from pathlib import Path

from tests.containers.steps import Line, Protocol

__all__ = ["write_report"]

_TEXT = """\
# Containers: the last result

Written by `make containers` (root, on Debian), which installs a Docker Engine, compiles Compose, buildx and two S3
servers, builds the images, and goes through [local.md](local.md) with each S3 server. Do not edit.

{date}, {minutes:.0f} min, {verdict}.

| what | version or size |
|---|---|
{facts}

Not run: RustFS, and the image of MinIO that [`compose.yaml`](../../infra/local/compose.yaml) names;
MinIO is compiled from its last source. {base}

| part | step | s | result |
|---|---|---:|---|
{lines}
"""


def write_report(protocol: Protocol, path: Path) -> None:
    """Write the page.

    Args:
        protocol: All steps.
        path: The page.
    """
    seconds = sum(line.seconds for line in protocol.lines)
    failed = [line for line in protocol.lines if not line.ok]
    base = next((line.result for line in protocol.lines if line.name == "base image"), "")
    path.write_text(
        _TEXT.format(
            date=f"{datetime.now(UTC):%Y-%m-%d}",
            minutes=seconds / 60,
            verdict=f"{len(failed)} steps failed" if failed else f"{len(protocol.lines)} steps, all passed",
            facts="\n".join(f"| {name} | {value} |" for name, value in protocol.facts.items()),
            base=f"Base image: {base}." if base else "",
            lines="\n".join(map(_row, protocol.lines)),
        )
    )


def _row(line: Line) -> str:
    result = line.result.replace("|", "\\|")[:160]
    return f"| {line.part} | {line.name} | {line.seconds:.0f} | {'' if line.ok else '**failed**: '}{result} |"
