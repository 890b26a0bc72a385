"""`scaling`: the global step rate of two workers of one thread against one worker of one thread, the same global batch.

Each process is bound to a core of its own. Beside it stands what the machine allows: two processes that do the same
work and never speak to each other.
"""

import json
import os
import statistics
import subprocess
import sys
import time

from tests.benchmarks.measure import report

_ROUNDS = 7


def scaling() -> None:
    """Strong scaling from one worker to two."""
    port = 24900
    alone = _Team([_Child(0, 1, port, batch=8)])
    together = _Team([_Child(rank, 2, port + 10, batch=4) for rank in range(2)])
    apart = _Team([_Child(rank, 1, port + 20 + rank, batch=4, core=rank) for rank in range(2)])
    teams = {"alone": alone, "together": together, "apart": apart}
    found: dict[str, list[float]] = {name: [] for name in teams}
    for team in teams.values():
        team.steps()
    for number in range(_ROUNDS):
        for name in list(teams) if number % 2 == 0 else reversed(teams):
            found[name].append(teams[name].steps())
    for team in teams.values():
        team.end()
    middle = {name: statistics.median(values) for name, values in found.items()}
    report(
        "scaling",
        middle["alone"] / middle["together"],
        ratio_without_communication=middle["alone"] / middle["apart"],
        one_worker_steps_s=16 / middle["alone"],
        two_workers_steps_s=16 / middle["together"],
    )


class _Child:
    """A worker process that takes 16 steps for each line that it reads."""

    def __init__(self, rank: int, world: int, port: int, batch: int, core: int | None = None) -> None:
        cluster = {"worker": [f"127.0.0.1:{port + i}" for i in range(world)]}
        config = {"cluster": cluster, "task": {"type": "worker", "index": rank}}
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
        if world > 1:
            environment["TF_CONFIG"] = json.dumps(config)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.scaling", str(batch), str(rank if core is None else core)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )


class _Team:
    """Processes that work at the same time."""

    def __init__(self, children: list[_Child]) -> None:
        self._processes = [child.process for child in children]

    def steps(self) -> float:
        """Let all take 16 steps; return the seconds until the last is done."""
        started = time.perf_counter()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in self._processes:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "done"
        return time.perf_counter() - started

    def end(self) -> None:
        """Close the processes."""
        for process in self._processes:
            process.communicate()


def _work(batch: int, core: int) -> None:
    os.sched_setaffinity(0, {core})
    from tests.benchmarks.step_rate import crops, limit_threads, our_steps

    limit_threads(1)
    from nucleus.training.distributed import Workers

    run = our_steps(Workers(), iter(crops(batch)))
    for _ in sys.stdin:
        run()
        print("done", flush=True)


if __name__ == "__main__":
    _work(int(sys.argv[1]), int(sys.argv[2]))
