"""Publishers that die at any moment, sixteen at once, and servers that cannot keep them apart."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from nucleus.cli.main import cli
from nucleus.config.names import Reference
from nucleus.config.recipe import GateOptions
from nucleus.errors import ConditionalWritesError, ModelError
from nucleus.registry.aliases import Alias, move_alias, pass_gate, read_alias
from nucleus.registry.manifest import ModelManifest, is_whole, list_models, list_versions, read_version, version_prefix
from nucleus.registry.publish import leftovers, publish, remove_leftover
from nucleus.registry.versions import pull
from nucleus.storage import bucket as conditions
from nucleus.storage.bucket import Bucket
from nucleus.storage.local_server import RunningStore
from tests.faults.proxy import Fault, Request, proxied
from tests.small_model import MODEL_FILES, origin


@pytest.fixture
def spawn() -> multiprocessing.context.BaseContext:
    """Processes that have loaded what they need, but share no connection with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _publish(bucket: Bucket, model_files: Path, run: str, endpoint: str | None = None, score: float = 0.5) -> None:
    if endpoint:
        os.environ["AWS_ENDPOINT_URL_S3"] = endpoint
    manifest = publish(bucket, "m", model_files, origin(run, score))
    pass_gate(bucket, manifest, GateOptions(), lambda _: 0.0)


def test_stopped_before_and_after_every_request(
    store: RunningStore,
    bucket: Bucket,
    model_files: Path,
    tmp_path: Path,
    spawn: multiprocessing.context.BaseContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = publish(bucket, "m", model_files, origin("first"))
    move_alias(bucket, "m", "production", 1)
    monkeypatch.setenv("NUCLEUS_BUCKET", str(bucket.uri))
    moment, stopped = 0, True
    while stopped:
        stopped = _stopped_at(moment, store, bucket, model_files, spawn)
        versions = list_versions(bucket, "m")
        assert versions[0] == 1
        pulled = tmp_path / f"pulled-{moment}"
        manifest = pull(bucket, Reference("m"), pulled)
        assert manifest.version == versions[-1]
        assert is_whole(pulled, manifest)
        alias = read_alias(bucket, "m", "production")
        assert alias is not None
        assert read_version(bucket, "m", alias.version)
        listed = CliRunner().invoke(cli, ["models", "list", "m", "--json"])
        assert [row["version"] for row in json.loads(listed.stdout)] == versions
        moment += 1
    assert moment > 2 * len(MODEL_FILES), "the publisher was stopped at each of its requests"
    begun = {leftover.version for leftover in leftovers(bucket, "m")}
    assert begun
    assert begun.isdisjoint(list_versions(bucket, "m"))
    before = list_versions(bucket, "m")
    for leftover in leftovers(bucket, "m"):
        remove_leftover(bucket, "m", leftover.version)
    assert leftovers(bucket, "m") == []
    assert list_versions(bucket, "m") == before
    assert read_version(bucket, "m", 1) == first


def _stopped_at(
    moment: int,
    store: RunningStore,
    bucket: Bucket,
    model_files: Path,
    spawn: multiprocessing.context.BaseContext,
) -> bool:
    """Publish in a process that is killed before (even) or after (odd) its request number `moment // 2`."""
    target, after = divmod(moment, 2)
    process: multiprocessing.process.BaseProcess

    def before_it(request: Request) -> Fault | None:
        if request.number == target and not after:
            os.kill(process.pid or 0, signal.SIGKILL)
            return Fault.RESET_BEFORE
        return None

    def after_it(number: int) -> None:
        if number == target and after:
            os.kill(process.pid or 0, signal.SIGKILL)

    with proxied(store.port, before_it, done=after_it) as proxy:
        process = spawn.Process(
            target=_publish, args=(bucket, model_files, f"moment-{moment}", proxy.endpoint, 0.6 + moment / 1000)
        )
        process.start()
        process.join(600)
        assert process.exitcode in {0, -signal.SIGKILL}
        return process.exitcode != 0


def test_sixteen_publish_at_once(bucket: Bucket, model_files: Path, spawn: multiprocessing.context.BaseContext) -> None:
    processes = [spawn.Process(target=_publish, args=(bucket, model_files, f"run-{number}")) for number in range(16)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0] * 16
    versions = list_versions(bucket, "m")
    assert versions == list(range(1, 17))
    manifests = [read_version(bucket, "m", version) for version in versions]
    assert {manifest.origin.run for manifest in manifests} == {f"run-{number}" for number in range(16)}
    assert leftovers(bucket, "m") == []


def _move(bucket: Bucket, version: int, moves: "multiprocessing.queues.Queue[str]") -> None:
    for _ in range(4):
        moves.put(move_alias(bucket, "m", "production", version).model_dump_json())


def test_sixteen_move_one_alias(bucket: Bucket, model_files: Path, spawn: multiprocessing.context.BaseContext) -> None:
    """Each move names what it moved from: the moves form one chain from nothing to what stands there in the end."""
    publish(bucket, "m", model_files, origin("r"))
    moves = spawn.Queue()
    processes = [spawn.Process(target=_move, args=(bucket, number, moves)) for number in range(1, 17)]
    for process in processes:
        process.start()
    answers = {moves.get(timeout=600) for _ in range(64)}  # who finds the alias where it wants it repeats a move
    for process in processes:
        process.join(600)
    chain = sorted((Alias.model_validate_json(answer) for answer in answers), key=lambda alias: alias.moved)
    assert chain[0].previous is None
    assert [move.previous for move in chain[1:]] == [move.version for move in chain[:-1]]
    assert read_alias(bucket, "m", "production") == chain[-1]


def test_servers_that_ignore_conditions_are_found_out(
    store: RunningStore, bucket: Bucket, model_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.check()  # its own connection leads past the proxies
    for dropped in ("if-none-match", "if-match"):
        monkeypatch.setattr(conditions, "_honoured", set())
        with proxied(store.port, dropped=[dropped]) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
            with pytest.raises(ConditionalWritesError, match=f"(?i){dropped}.* --single-writer"):
                publish(Bucket(bucket.uri), "m", model_files, origin("r"))
            alone = Bucket(bucket.uri, single_writer=True)
            assert list_models(alone) == (["m"] if dropped == "if-match" else [])
            published = publish(alone, "m", model_files, origin("r"))
            move_alias(alone, "m", "production", published.version)
    assert list_versions(bucket, "m") == [1, 2]


def test_a_publisher_whose_claim_was_cleaned_away_does_not_publish(
    bucket: Bucket, model_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Bucket.put

    def cleaned_meanwhile(self: Bucket, key: str, *arguments: object, **options: object) -> str:
        done = put(self, key, *arguments, **options)
        if key.endswith(MODEL_FILES[-1]):
            for leftover in leftovers(bucket, "m"):
                remove_leftover(bucket, "m", leftover.version)
        return done

    monkeypatch.setattr(Bucket, "put", cleaned_meanwhile)
    with pytest.raises(ModelError, match="claim"):
        publish(bucket, "m", model_files, origin("r"))
    assert list_versions(bucket, "m") == []


def test_clean_as_typed(bucket: Bucket, model_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUCLEUS_BUCKET", str(bucket.uri))

    def clean(*arguments: str) -> str:
        result = CliRunner().invoke(cli, ["models", "clean", *arguments])
        assert result.exit_code == 0, result.output
        return result.output

    assert "no leftovers" in clean()
    manifest: ModelManifest = publish(bucket, "m", model_files, origin("r"))
    bucket.put(f"{version_prefix('m', 2)}/claim.json", b"{}")
    bucket.put(f"{version_prefix('m', 2)}/model.json", b"{}")
    assert "recent" in clean("m", "--remove")
    assert "leftover" in clean("--older-than", "0")
    assert "removed" in clean("--older-than", "0", "--remove")
    assert "no leftovers" in clean("--older-than", "0")
    assert read_version(bucket, "m", 1) == manifest
    assert not remove_leftover(bucket, "m", 1)
    assert len(list(bucket.objects(f"{version_prefix('m', 1)}/"))) == len(MODEL_FILES) + 2  # with claim and manifest
