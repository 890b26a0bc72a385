"""What a fuzzer asks of the API: whatever it sends, no answer is 500, and each is as /openapi.json describes it."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings

from nucleus.serve.app import create_app
from nucleus.serve.following import ServedModel
from nucleus.serve.lanes import Lanes
from nucleus.serve.service import ServeSettings, Service


@pytest.fixture(scope="module")
def schema(served: ServedModel) -> schemathesis.schemas.BaseSchema:
    service = Service(ServeSettings(max_pixels=10_000), served, Lanes(lambda: served.model))
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(service), headers={"host": "127.0.0.1"})


api = schemathesis.pytest.from_fixture("schema")


@api.parametrize()
@settings(
    max_examples=25, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck), deadline=None
)
def test_whatever_is_asked(case: schemathesis.Case) -> None:
    answer = case.call(headers={"host": "127.0.0.1"})
    assert answer.status_code < 500, (answer.status_code, answer.text)
    if answer.status_code >= 400:
        assert answer.headers["content-type"][0].startswith("application/problem+json")
        assert answer.json()["detail"].startswith("Expected ")
