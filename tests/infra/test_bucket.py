"""The bucket's lifecycle: runs expire, nothing else does."""

import json
from pathlib import Path
from typing import Any

import boto3
import pytest

from nucleus.storage.local_server import RunningStore

RULES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "infra" / "aws" / "bucket-lifecycle.json").read_text()
)["Rules"]
DELETING = {"Expiration", "NoncurrentVersionExpiration", "Transitions", "NoncurrentVersionTransitions"}


def test_server_takes_and_returns_it(store: RunningStore) -> None:  # noqa: ARG001
    client = boto3.client("s3")
    client.create_bucket(Bucket="with-lifecycle")
    client.put_bucket_lifecycle_configuration(Bucket="with-lifecycle", LifecycleConfiguration={"Rules": RULES})
    kept = client.get_bucket_lifecycle_configuration(Bucket="with-lifecycle")["Rules"]
    key = {rule["ID"]: rule for rule in kept}
    assert set(key) == {rule["ID"] for rule in RULES}
    assert key["ExpireOldRuns"]["Expiration"]["Days"] == 90
    assert key["ExpireOldRuns"]["Filter"]["Prefix"] == "runs/"


@pytest.mark.parametrize(
    "name",
    [
        "models/dsb2018/versions/000001/model.weights.h5",
        "models/dsb2018/aliases/production.json",
        "datasets/dsb2018/ef047f5d96d3/manifest.json",
        "weights/mobilenet_v2/0123.weights.h5",
    ],
)
def test_nothing_but_runs_expires(name: str) -> None:
    reaching = [rule for rule in RULES if name.startswith(rule["Filter"]["Prefix"])]
    assert all(not DELETING & set(rule) for rule in reaching)


def test_each_rule_does_one_thing() -> None:
    expire, abort = RULES
    assert expire["Expiration"] == {"Days": 90}
    assert abort["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 7}
    assert all(
        set(rule) - {"ID", "Status", "Filter"} <= {*DELETING, "AbortIncompleteMultipartUpload"} for rule in RULES
    )
    assert all(rule["Status"] == "Enabled" for rule in RULES)
