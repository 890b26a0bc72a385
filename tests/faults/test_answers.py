"""Answers that are not those of S3, refusals that last, and credentials that do not come or expire."""

import json
import re
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from nucleus.cli.main import cli
from nucleus.errors import AccessDeniedError, ConditionalWritesError, NucleusError, ObjectExistsError, StorageError
from nucleus.storage.bucket import Bucket, check_conditional_writes
from nucleus.storage.local_server import RunningStore
from nucleus.storage.retries import set_retry_clock, set_storage_timeout
from nucleus.storage.uri import S3Uri
from tests.faults.credentials import without_keys, written
from tests.faults.proxy import Answer, Fault, Proxy, Request, proxied, refusal
from tests.faults.test_requests import DrivenClock

CONSOLE = b"<!DOCTYPE html><html><head><title>Console</title></head><body>Log in</body></html>"
PAGE = {"Content-Type": "text/html", "ETag": '"5f"'}
DOCUMENT = {"Content-Type": "application/xml"}
ENTRY = (
    "<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00Z</LastModified><ETag>x</ETag><Size>1</Size></Contents>"
)


@pytest.fixture(autouse=True)
def clock() -> Iterator[DrivenClock]:
    """Retries take no time; a server of low priority may be silent for 20 s of the real one."""
    import time

    driven = DrivenClock()
    set_retry_clock(driven)
    set_storage_timeout(60.0)
    yield driven
    set_retry_clock(time)


@pytest.fixture
def line(store: RunningStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the store."""
    with proxied(store.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        yield proxy


def always(answer: Answer) -> Callable[[Request], Answer]:
    """Give one answer to every request."""
    return lambda _: answer


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (Answer(200, PAGE, CONSOLE), "a web page"),
        (Answer(200, {"Content-Type": "text/plain"}, b""), "an empty answer"),
        (Answer(200, DOCUMENT, b"<?xml version='1.0'?><Status>ok</Status>"), "<Status>"),
        (Answer(200, {"Content-Type": "application/json"}, b'{"status": "ok"}'), "no XML"),
        (Answer(204, {}, b""), "an empty answer"),
    ],
)
@pytest.mark.parametrize("command", [["models", "list"], ["runs", "list"], ["data", "list", "cells"]], ids=" ".join)
def test_no_listing(
    line: Proxy, bucket_uri: S3Uri, monkeypatch: pytest.MonkeyPatch, answer: Answer, found: str, command: list[str]
) -> None:
    monkeypatch.setenv("NUCLEUS_BUCKET", str(bucket_uri))
    line.scripted = always(answer)
    run = CliRunner().invoke(cli, command)
    assert run.exit_code == 1
    assert found in run.stderr
    assert line.endpoint in run.stderr
    assert run.stdout == ""


@pytest.mark.parametrize("operation", ["get", "put", "delete"])
def test_a_web_page_is_no_answer(line: Proxy, bucket_uri: S3Uri, operation: str) -> None:
    line.scripted = always(Answer(200, {"Content-Type": "text/html"}, CONSOLE))
    bucket = Bucket(bucket_uri)
    ask = {"get": lambda: bucket.get("x"), "put": lambda: bucket.put("x", b"1"), "delete": lambda: bucket.delete("x")}
    with pytest.raises(StorageError, match=r"web page|ETag"):
        ask[operation]()


def listing(entries: list[str], token: str | None, *, truncated: bool = True) -> Answer:
    """A page of a listing."""
    following = f"<NextContinuationToken>{token}</NextContinuationToken>" if token else ""
    text = f"<ListBucketResult><IsTruncated>{str(truncated).lower()}</IsTruncated>{following}{''.join(entries)}"
    return Answer(200, DOCUMENT, f"{text}</ListBucketResult>".encode())


def entries(uri: S3Uri, *names: str) -> list[str]:
    """Entries of a listing."""
    return [ENTRY.format(key=f"{uri.key}/{name}") for name in names]


@pytest.mark.parametrize(
    ("names", "token", "found"),
    [
        (lambda _: ["a", "b"], lambda _: "t", "of a page before"),
        (lambda number: [f"a{number:03}"], lambda _: "t", "the token of a page before"),
        (lambda _: ["a", "b"], lambda number: f"t{number}", "the entries of a page before"),
        (lambda number: ["a"] if number % 2 else ["b"], lambda number: f"t{number}", "the entries of a page before"),
        (lambda number: [f"a{number:03}"], lambda number: f"t{number % 3}", "the token of a page before"),
        (lambda _: ["a"], lambda _: None, "none, though"),
        (lambda _: [], lambda number: f"t{number}", "without, one after another"),
    ],
    ids=["same page", "same token", "same entries", "two pages in turn", "three tokens in turn", "no token", "no end"],
)
def test_a_listing_without_end(
    line: Proxy,
    bucket_uri: S3Uri,
    names: Callable[[int], list[str]],
    token: Callable[[int], str | None],
    found: str,
) -> None:
    line.scripted = lambda request: listing(entries(bucket_uri, *names(request.number)), token(request.number))
    with pytest.raises(StorageError, match=found):
        list(Bucket(bucket_uri).objects(""))
    assert line.requests <= (1001 if found.startswith("without") else 4)


def test_pages_that_follow_each_other(line: Proxy, bucket_uri: S3Uri) -> None:
    pages = [(["a", "b"], "1"), ([], "2"), (["c"], "3"), (["d"], None)]
    line.scripted = lambda request: listing(
        entries(bucket_uri, *pages[request.number][0]), pages[request.number][1], truncated=request.number < 3
    )
    assert [item.key for item in Bucket(bucket_uri).objects("")] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("field", ["Key", "Size", "LastModified", "ETag"])
def test_an_entry_without_a_field(line: Proxy, bucket_uri: S3Uri, field: str) -> None:
    whole = entries(bucket_uri, "a")[0]
    line.scripted = always(listing([re.sub(f"<{field}>.*</{field}>", "", whole)], None, truncated=False))
    with pytest.raises(StorageError, match=f"without {field}"):
        list(Bucket(bucket_uri).objects(""))


def test_a_listing_that_ignores_the_prefix(line: Proxy, bucket_uri: S3Uri) -> None:
    line.scripted = always(listing([ENTRY.format(key="others/a")], None, truncated=False))
    with pytest.raises(StorageError, match="others/a"):
        list(Bucket(bucket_uri).objects(""))


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("location", ["https://s3.example/bucket?list-type=2", None, "/login"])
def test_redirects(line: Proxy, bucket_uri: S3Uri, status: int, location: str | None) -> None:
    """As of a server that wants https; botocore would ask for the bucket's region without end."""
    line.scripted = always(Answer(status, {"Location": location} if location else {}))
    bucket = Bucket(bucket_uri)
    wanted = r"AWS_ENDPOINT_URL_S3=https://s3\.example" if location and "://" in location else "redirects"
    for number, ask in enumerate((bucket.check, lambda: bucket.get("x"), lambda: bucket.put("x", b"1")), start=1):
        with pytest.raises(StorageError, match=wanted):
            ask()
        assert line.requests == number


def test_a_redirect_with_an_error_but_no_region(line: Proxy, bucket_uri: S3Uri) -> None:
    line.scripted = always(refusal(307, "TemporaryRedirect"))
    with pytest.raises(StorageError, match="redirects HeadBucket"):
        Bucket(bucket_uri).check()
    assert line.requests == 2


def conditions_unknown(request: Request) -> Answer | None:
    """A server without conditional writes."""
    if {"if-match", "if-none-match"} & set(request.headers):
        return refusal(501, "NotImplemented", "A header you provided implies functionality that is not implemented")
    return None


def test_conditions_that_a_server_does_not_know(line: Proxy, bucket_uri: S3Uri) -> None:
    line.scripted = conditions_unknown
    shared, alone = Bucket(bucket_uri), Bucket(bucket_uri, single_writer=True)
    with pytest.raises(ConditionalWritesError, match="--single-writer"):
        shared.put("x", b"1", if_absent=True)
    with pytest.raises(ConditionalWritesError, match="--single-writer"):
        check_conditional_writes(shared)
    check_conditional_writes(alone)
    tag = alone.put("x", b"1", if_absent=True)
    with pytest.raises(ObjectExistsError):
        alone.put("x", b"2", if_absent=True)
    new = alone.put("x", b"3", if_match=tag)
    with pytest.raises(ObjectExistsError):
        alone.put("x", b"4", if_match=tag)
    assert alone.get_tagged("x") == (b"3", new)


def test_an_import_into_a_server_without_conditions(
    line: Proxy, bucket_uri: S3Uri, dozen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUCLEUS_BUCKET", str(bucket_uri))
    line.scripted = conditions_unknown
    run = CliRunner().invoke(cli, ["data", "import", str(dozen), "d"])
    assert run.exit_code == 1
    assert "add --single-writer" in run.stderr
    run = CliRunner().invoke(cli, ["data", "import", str(dozen), "d", "--single-writer"])
    assert run.exit_code == 0, run.output
    run = CliRunner().invoke(cli, ["data", "list", "--json"])
    assert [dataset["name"] for dataset in json.loads(run.stdout)] == ["d"]


def test_a_full_store(line: Proxy, bucket_uri: S3Uri, clock: DrivenClock) -> None:
    """Not asked again, and told in the server's own words."""
    line.scripted = always(refusal(507, "XMinioStorageFull", "Storage backend has reached its minimum free drive"))
    with pytest.raises(StorageError, match=r"store is full: .*minimum free drive"):
        Bucket(bucket_uri).put("x", b"1")
    assert clock.waits == []
    assert line.requests == 1


def test_the_servers_own_sentence(line: Proxy, bucket_uri: S3Uri) -> None:
    line.scripted = always(refusal(503, "SlowDown", "Please reduce your request rate"))
    with pytest.raises(StorageError, match="Please reduce your request rate"):
        Bucket(bucket_uri).put("x", b"1")


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (403, "SignatureDoesNotMatch"),
        (400, "XAmzContentSHA256Mismatch"),
        (501, "NotImplemented"),
        (403, "AccessDenied"),
    ],
)
def test_a_server_that_does_not_know_the_checksums(
    line: Proxy, bucket_uri: S3Uri, monkeypatch: pytest.MonkeyPatch, status: int, code: str
) -> None:
    def old(request: Request) -> Answer | None:
        new = request.method == "PUT" and "x-amz-sdk-checksum-algorithm" in request.headers
        return refusal(status, code) if new else None

    line.scripted = old
    with pytest.raises(StorageError, match="AWS_REQUEST_CHECKSUM_CALCULATION=when_required"):
        Bucket(bucket_uri).put("x", b"1")
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    Bucket(bucket_uri).put("x", b"1")
    assert Bucket(bucket_uri).get("x") == b"1"


def test_a_server_that_stores_other_bytes(line: Proxy, bucket_uri: S3Uri, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that takes the parts of an upload in chunks for the object, and has no checksums."""
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    line.changed = lambda body: body.replace(b"Written by nucleus", b"5\r\nWritten by nucleus")
    with pytest.raises(StorageError, match="found other bytes"):
        check_conditional_writes(Bucket(bucket_uri))


def program(tmp_path: Path, text: str) -> Path:
    """An executable Python program."""
    file = tmp_path / "credentials-program"
    file.write_text(f"#!{sys.executable}\n{text}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


GOOD = 'import json; print(json.dumps({"Version": 1, "AccessKeyId": "KEYOFPROGRAM", "SecretAccessKey": "s"}))'


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import time; time.sleep(3600)", "did not end within"),
        (f'print("Welcome!"); {GOOD}', "more than one JSON document, or none"),
        (f"{GOOD}; {GOOD}", "more than one JSON document, or none"),
        ("", "more than one JSON document, or none"),
        ("print([1])", "not an object"),
        ("print({})", "Unsupported version"),
        ('print(\'{"Version": 1}\')', "Missing required key"),
        ('import sys; sys.stderr.buffer.write(b"no ticket \\xff"); sys.exit(3)', "no ticket"),
        ("raise SystemExit(4)", "exit status 4"),
        ('import json; print(json.dumps({"Version": 1, "AccessKeyId": "k", "SecretAccessKey": "s", '
         '"SessionToken": "t", "Expiration": "tomorrow"}))', "AWS configuration"),
    ],
)  # fmt: skip
def test_a_program_that_gives_no_credentials(
    line: Proxy, bucket_uri: S3Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, found: str
) -> None:
    by_program(program(tmp_path, text), tmp_path, monkeypatch)
    set_storage_timeout(0.5 if "3600" in text else 60.0)
    with pytest.raises(AccessDeniedError, match=found) as caught:
        Bucket(bucket_uri).check()
    assert "KEYOFPROGRAM" not in str(caught.value)
    assert "endpoint" not in str(caught.value)
    assert line.requests == 0


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"AWS_PROFILE": "nosuch"}, "nosuch"),
        ({"AWS_REGION": "no region"}, "no region"),
        ({"AWS_CONFIG_FILE": "{broken}"}, "Unable to parse"),
        ({"AWS_SHARED_CREDENTIALS_FILE": "{broken}", "AWS_ACCESS_KEY_ID": ""}, "Unable to parse"),
        ({"AWS_SECRET_ACCESS_KEY": ""}, "AWS_SECRET_ACCESS_KEY"),
        ({"AWS_WEB_IDENTITY_TOKEN_FILE": "/nosuch", "AWS_ROLE_ARN": "arn:aws:iam::1:role/x", "AWS_ACCESS_KEY_ID": ""},
         "/nosuch"),
        ({"AWS_ENDPOINT_URL_S3": "127.0.0.1:9000"}, "Expected a URL such as"),
        ({"AWS_ENDPOINT_URL_S3": "{https}"}, "http:// instead of https://"),
        ({"AWS_ENDPOINT_URL_S3": "{https}", "AWS_CA_BUNDLE": "/nosuch"}, "AWS_CA_BUNDLE"),
        ({"AWS_ENDPOINT_URL_S3": "{https}", "AWS_CA_BUNDLE": "{broken}"}, "AWS_CA_BUNDLE"),
        ({"AWS_REQUEST_CHECKSUM_CALCULATION": "sometimes"}, "sometimes"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_configuration(
    line: Proxy,
    bucket_uri: S3Uri,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, str],
    found: str,
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("[default\nx")
    for name, value in settings.items():
        monkeypatch.setenv(name, value.format(broken=broken, https=line.endpoint.replace("http:", "https:")))
        if not value:
            monkeypatch.delenv(name)
    with pytest.raises(StorageError, match=re.escape(found)):
        Bucket(bucket_uri).check()


def test_a_program_for_the_keys_of_a_role(
    line: Proxy, bucket_uri: S3Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_program(program(tmp_path, "import time; time.sleep(3600)"), tmp_path, monkeypatch)
    config = tmp_path / "aws-config"
    base = config.read_text().replace("[default]", "[profile base]")
    config.write_text(f"{base}[default]\nrole_arn = arn:aws:iam::1:role/x\nsource_profile = base\n")
    set_storage_timeout(0.5)
    with pytest.raises(AccessDeniedError, match="did not end within"):
        Bucket(bucket_uri).check()
    assert line.requests == 0


def test_a_program_that_is_not_there(
    line: Proxy, bucket_uri: S3Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_program(tmp_path / "missing", tmp_path, monkeypatch)
    with pytest.raises(AccessDeniedError, match="cannot be run"):
        Bucket(bucket_uri).check()
    assert line.requests == 0


def test_a_program_that_gives_credentials(
    line: Proxy, bucket_uri: S3Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_program(program(tmp_path, GOOD), tmp_path, monkeypatch)
    set_storage_timeout(60.0)
    Bucket(bucket_uri).put("x", b"1")
    assert "Credential=KEYOFPROGRAM/" in line.log[-1].headers["authorization"]


def by_program(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configure the AWS SDK to get its credentials from a program."""
    without_keys(monkeypatch)
    config = tmp_path / "aws-config"
    config.write_text(f"[default]\ncredential_process = {file}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidToken", "InvalidAccessKeyId"])
def test_credentials_that_are_renewed_in_their_file(
    line: Proxy, bucket_uri: S3Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    without_keys(monkeypatch)
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    written(file, "FIRST")
    bucket = Bucket(bucket_uri)
    bucket.put("x", b"1")
    line.scripted = lambda request: (
        refusal(403, code) if "Credential=FIRST/" in request.headers["authorization"] else None
    )
    with pytest.raises(AccessDeniedError, match=code):
        bucket.get("x")
    written(file, "SECOND")
    before = line.requests
    assert bucket.get("x") == b"1"
    assert line.requests == before + 2
    bucket.download("x", tmp_path / "x")
    bucket.put("x", tmp_path / "x")
    assert [item.key for item in bucket.objects("")] == ["x"]
    assert line.requests == before + 5


def test_a_download_goes_on_where_it_broke_off(line: Proxy, bucket_uri: S3Uri, tmp_path: Path) -> None:
    data = bytes(range(256)) * 20_000
    bucket = Bucket(bucket_uri)
    bucket.put("x", data)
    before = line.requests
    line.decide = lambda request: Fault.SHORT if request.number == before else None
    told: list[int] = []
    bucket.download("x", tmp_path / "x", advance=lambda received, _: told.append(received))
    assert (tmp_path / "x").read_bytes() == data
    first, second = [request.headers.get("range") for request in line.log[before:]]
    assert first is None
    assert second == f"bytes={len(data) // 2}-"
    assert told == sorted(told)


def test_a_download_of_an_object_that_is_replaced_meanwhile(line: Proxy, bucket_uri: S3Uri, tmp_path: Path) -> None:
    old, new = b"old" * 2_000_000, b"newer" * 1_000_000
    bucket = Bucket(bucket_uri)
    bucket.put("x", old)
    before = line.requests

    def replace(number: int) -> None:
        if number == before:
            Bucket(bucket_uri).put("x", new)

    line.done = replace
    line.decide = lambda request: Fault.SHORT if request.number == before else None
    bucket.download("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == new


def test_a_server_without_ranges(line: Proxy, bucket_uri: S3Uri, tmp_path: Path) -> None:
    line.dropped |= {"range"}
    data = bytes(range(256)) * 20_000
    bucket = Bucket(bucket_uri)
    bucket.put("x", data)
    before = line.requests
    line.decide = lambda request: Fault.SHORT if request.number == before else None
    bucket.download("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == data


@pytest.mark.parametrize("status", [200, 206, 299, 304, 400, 402, 404, 405, 411, 418, 422, 500, 599])
def test_errors_are_of_this_project(line: Proxy, bucket_uri: S3Uri, status: int) -> None:
    """Whatever a server answers: it is never taken for success, and no other library's error reaches the user."""
    set_storage_timeout(0.1)
    bucket = Bucket(bucket_uri)
    for body in (b"", b"<Error/>", b"<Error><Code/></Error>", b"\xff\xfe", CONSOLE, b"<a><b></a>"):
        line.scripted = always(Answer(status, {}, body))
        for ask in (bucket.check, lambda: bucket.put("x", b"1"), lambda: bucket.get("x")):
            with pytest.raises(NucleusError):
                ask()
