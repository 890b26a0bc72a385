"""What an IAM policy allows, for the part of IAM's language that `infra/aws/iam-policy.json` uses."""

import json
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from tests.faults.proxy import Request

__all__ = ["JOB_POLICY", "allows"]

JOB_POLICY = json.loads((Path(__file__).parents[2] / "infra" / "aws" / "iam-policy.json").read_text())


def allows(policy: dict, request: Request, bucket: str) -> bool:
    """Whether an IAM policy allows a request to S3 (path style): the part of IAM's language that this one uses."""
    address = urlsplit(request.path)
    name, _, key = unquote(address.path).lstrip("/").partition("/")
    prefix = parse_qs(address.query, keep_blank_values=True).get("prefix", [None])[0]
    if request.method in {"GET", "HEAD"}:
        action = "s3:GetObject" if key else "s3:ListBucket"
    else:
        action = {"PUT": "s3:PutObject", "DELETE": "s3:DeleteObject", "POST": "s3:PutObject"}[request.method]
    resource = f"arn:aws:s3:::{name}/{key}" if key else f"arn:aws:s3:::{name}"

    def holds(operator: str, field: str, wanted: list[str] | str) -> bool:
        if operator == "StringLikeIfExists":
            assert field == "s3:prefix"
            return prefix is None or any(fnmatchcase(prefix, pattern) for pattern in wanted)
        assert operator == "Null"
        return (field.removeprefix("s3:") not in request.headers) == (wanted == "true")

    def covers(statement: dict) -> bool:
        resources = statement["Resource"] if isinstance(statement["Resource"], list) else [statement["Resource"]]
        conditions = statement.get("Condition", {}).items()
        return (
            statement["Action"] == action
            and any(fnmatchcase(resource, pattern.replace("BUCKET", bucket)) for pattern in resources)
            and all(holds(operator, *item) for operator, fields in conditions for item in fields.items())
        )

    assert all(statement["Effect"] == "Allow" for statement in policy["Statement"])
    return any(covers(statement) for statement in policy["Statement"])
