"""schemathesis sends what /openapi.json describes, and what it forbids: the server answers, and never with a 500."""

import json
import urllib.request

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from support.effort import LONG
from support.openai_servers import here

pytestmark = pytest.mark.slow
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
GENERATES = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
OTHERS = ("/tokenize", "/detokenize")
CASES = 220 if LONG else 10  # of an address, that the description allows, and as many that it forbids


@pytest.fixture(scope="module")
def address(wrapper):
    with here(wrapper.unwrap_python_model(), defaults=[("max_tokens", 2)], max_tokens=4, seconds=60) as (address, _):
        yield address


@pytest.fixture(scope="module")
def described(address):
    return schemathesis.openapi.from_dict(json.load(urllib.request.urlopen(f"{address}/openapi.json", timeout=20)))


def operations(described) -> dict:
    return {found.ok().path: found.ok() for found in described.get_all_operations()}


def test_every_address_is_described(described, address):
    paths = {"/metrics", "/health", "/openapi.json", "/v1/models", "/v1/models/{name}", *GENERATES, *OTHERS}
    assert set(operations(described)) == paths
    for path in ("/metrics", "/health", "/openapi.json", "/v1/models"):
        response = operations(described)[path].Case().call(base_url=address, timeout=60)
        assert response.status_code == 200
        operations(described)[path].validate_response(response)


@pytest.mark.fault("serving: requests that nobody would write by hand")
@pytest.mark.parametrize(
    ("path", "mode"),
    [(path, GenerationMode.POSITIVE) for path in (*GENERATES, *OTHERS, "/v1/models/{name}")]
    + [(path, GenerationMode.NEGATIVE) for path in (*GENERATES, *OTHERS)],
)
def test_no_request_is_answered_with_a_500_or_never(described, address, path, mode):
    cases = operations(described)[path].as_strategy(generation_mode=mode)

    @hypothesis.settings(
        max_examples=CASES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=cases)
    def send(case):
        response = case.call(base_url=address, timeout=120)
        case.validate_response(response, checks=CHECKS)

    send()
