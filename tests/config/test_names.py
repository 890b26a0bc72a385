import pytest

from nucleus.config.names import Reference, check_name, clean_name, parse_reference
from nucleus.errors import UriError
from nucleus.storage.uri import S3Uri, bucket_from_environment, parse_uri


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Plate 3/Well A01.PNG", "plate-3-well-a01.png"),
        ("ÄÖÜ", "image"),
        ("..hidden", "hidden"),
        ("a" * 100, "a" * 63),
        ("x\ny", "x-y"),
    ],
)
def test_cleaned_names_are_names(text: str, expected: str) -> None:
    assert clean_name(text) == expected
    assert check_name(clean_name(text), "image") == expected


@pytest.mark.parametrize("name", ["", "Upper", "a/b", "../x", "-x", "a" * 64, "a b"])
def test_bad_names_are_refused_with_a_suggestion(name: str) -> None:
    with pytest.raises(UriError, match="Try"):
        check_name(name, "model")


def test_references() -> None:
    assert parse_reference("dsb2018", "model") == Reference("dsb2018", "latest")
    assert parse_reference("dsb2018@7", "model") == Reference("dsb2018", "7")
    with pytest.raises(UriError, match="after the @"):
        parse_reference("dsb2018@", "model")
    with pytest.raises(UriError, match=r"correction set name .* Try 'correction-set'\."):
        check_name("..", "correction set")
    with pytest.raises(UriError, match="Try 'dsb2018@7'"):
        parse_reference("dsb2018:7", "model")
    with pytest.raises(UriError, match="Expected a dataset name"):
        parse_reference("s3:/cells/dsb2018", "dataset")


def test_uris() -> None:
    uri = parse_uri("s3://cells/a/b/")
    assert (uri, str(uri), uri.name, str(uri.parent)) == (S3Uri("cells", "a/b"), "s3://cells/a/b", "b", "s3://cells/a")
    assert str(uri / "c/") == "s3://cells/a/b/c"
    for wrong in ("cells/a", "http://cells/a", "s3://", "s3://cells/../x", "s3://cells/a//b"):
        with pytest.raises(UriError, match="Expected s3://"):
            parse_uri(wrong)


def test_bucket_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUCLEUS_BUCKET", raising=False)
    with pytest.raises(UriError, match="export NUCLEUS_BUCKET="):
        bucket_from_environment()
    monkeypatch.setenv("NUCLEUS_BUCKET", "s3://cells")
    assert bucket_from_environment() == S3Uri("cells")
    assert bucket_from_environment("s3://other/x") == S3Uri("other", "x")
