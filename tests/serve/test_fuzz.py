"""What a fuzzer asks of the API: whatever it sends, no answer is 500, and each error is a problem in our words."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from nucleus.serve.app import create_app
from nucleus.serve.following import ServedModel
from nucleus.serve.lanes import Lanes
from nucleus.serve.problems import PROBLEM
from nucleus.serve.service import ServeSettings, Service

HEADERS = {"host": "127.0.0.1"}


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_whatever_is_asked(served: ServedModel, mode: GenerationMode) -> None:
    """Requests as /openapi.json describes them, and others."""
    service = Service(ServeSettings(max_pixels=10_000), served, Lanes(lambda: served.model))
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(service), headers=HEADERS)
    answers = []
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode == GenerationMode.NEGATIVE and operation.path != "/v1/segment":
            continue  # the others take nothing that could be wrong

        @settings(max_examples=20, phases=[Phase.generate], suppress_health_check=list(HealthCheck), deadline=None)
        @given(operation.as_strategy(generation_mode=mode))
        def ask(case: schemathesis.Case) -> None:
            answer = case.call(headers=HEADERS)
            answers.append(answer.status_code)
            assert answer.status_code not in {500, 501, 502}, answer.text
            if answer.status_code >= 400:
                assert answer.headers["content-type"] == [PROBLEM]
                assert answer.json()["detail"].startswith("Expected ")

        ask()
    service.segmenter.close()
    assert len(answers) >= 15
