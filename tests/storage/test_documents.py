import json

import pytest

from nucleus.data.dataset import read_manifest
from nucleus.errors import DataError, ModelError
from nucleus.registry.manifest import read_model_manifest


@pytest.mark.parametrize(("read", "error"), [(read_manifest, DataError), (read_model_manifest, ModelError)])
def test_damaged_and_newer_documents(read, error) -> None:
    for damaged in (b"", b"{", b"\xff\xfe", b"[]", b"null", b'{"format": 1}', b'{"format": "2"}'):
        with pytest.raises(error, match=r"s3://b/x; .*damaged"):
            read(damaged, "s3://b/x")
    with pytest.raises(error, match=r"format [1-9] .*s3://b/x; .*format 9\. .*upgrade"):
        read(json.dumps({"format": 9, "anything": 1}).encode(), "s3://b/x")
