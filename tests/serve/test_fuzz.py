"""What a fuzzer asks of the API: whatever it sends, no answer is 500, and each error is a problem in our words."""

from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from nucleus.data.synthetic import generated_image
from nucleus.serve.app import create_app
from nucleus.serve.following import ServedModel
from nucleus.serve.lanes import Lanes
from nucleus.serve.problems import PROBLEM
from nucleus.serve.service import ServeSettings, Service
from tests.serve.conftest import Connect
from tests.slide_files import write_svs

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


PAIRS = st.tuples(
    st.sampled_from(["name", "uri", "z", "t", "channel", "diameter", "pixel-size", "tta"]),
    st.sampled_from(["", "0", "all", "max", "1e9", "true", "a.mrxs", "s3://b/in/a.zarr", "s3://b/in/../c", "%00"]),
)
HEADED = st.dictionaries(
    st.sampled_from(["content-encoding", "content-type", "accept", "expect"]),
    st.sampled_from(
        ["identity", "gzip", "application/json", "multipart/form-data; boundary=b", "image/png", "*/*;q=x"]
    ),
)


def test_damaged_slides_and_odd_requests(connect: Connect, tmp_path: Path) -> None:
    """Slides with other bytes in them, options given twice, and headers that contradict the body."""
    slide = write_svs(tmp_path / "a.svs", generated_image(3, 64, 64)[0]).read_bytes()
    client = connect(max_pixels=10_000, images=("s3://c/other",))
    answers = set()

    @settings(
        max_examples=40,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        deadline=None,
        derandomize=True,
    )
    @given(st.data(), st.lists(PAIRS, max_size=3), HEADED)
    def ask(data: st.DataObject, options: list[tuple[str, str]], headers: dict[str, str]) -> None:
        content = bytearray(slide)
        for place in data.draw(st.lists(st.integers(0, len(slide) - 1), max_size=20)):
            content[place] ^= 0xFF
        del content[data.draw(st.sampled_from([len(slide), 500, 4])) :]
        query = "?" + "&".join(f"{name}={value}" for name, value in options)
        answer = client.post(bytes(content), query, **headers)
        answers.add(answer.status_code)
        assert answer.status_code not in {500, 501, 502}, answer.text
        if answer.status_code >= 400:
            assert answer.headers["content-type"] == PROBLEM
            assert answer.json()["detail"].startswith("Expected ")

    ask()
    assert {200, 400, 415, 422} <= answers
