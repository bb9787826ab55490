"""Real clients as their users write them: LangChain, instructor, LiteLLM, Pydantic AI, and lm-evaluation-harness.

The first four have an environment of their own. benchmarks/clients.py is what they run. test_openai_api.py has the
openai client, and MLflow's gateway.
"""

import hashlib

import pytest
from support import harness
from support.commands import REPOSITORY, call, python_with
from support.openai_servers import NAME, with_tools

pytestmark = pytest.mark.slow
PACKAGES = REPOSITORY / "tests" / "support" / "clients.txt"
TEMPLATE = REPOSITORY / "tests" / "support" / "tool_templates" / "qwen2.5.jinja"


@pytest.fixture(scope="module")
def python():
    content = hashlib.sha256(PACKAGES.read_bytes()).hexdigest()[:16]
    return python_with(f"clients-{content}", "-r", PACKAGES)


@pytest.fixture(scope="module")
def address(wrapper):
    """A server over a model whose template takes tools."""
    with with_tools(wrapper.unwrap_python_model(), TEMPLATE) as (address, _):
        yield address


@pytest.mark.parametrize("client", ["LangChain", "instructor", "LiteLLM", "Pydantic AI"])
def test_a_client_gets_texts_streams_structures_and_calls(python, address, client):
    done = call(python, "benchmarks/clients.py", f"{address}/v1", NAME, "--tools", f"--only={client}", PYTHONPATH="")
    assert done.code == 0 and done.out.startswith(f"{client}: "), done.out + done.err


@pytest.mark.parametrize("tokenized", [True, False])
def test_lm_evals_local_completions_finds_the_accuracy_of_the_harness_in_process(
    wrapper, address, checkpoint, tokenized
):
    task, documents = "prompts/tasks/science.yaml", 4
    expected = harness.ours(wrapper, task, documents)
    found = harness.by_api(f"{address}/v1/completions", NAME, checkpoint.folder, task, documents, tokenized)
    assert found["results"]["science"] == expected["results"]["science"]
    for one, other in zip(found["samples"]["science"], expected["samples"]["science"], strict=True):
        values = [[response[0][0] for response in sample["resps"]] for sample in (one, other)]
        assert values[0] == pytest.approx(values[1], abs=1e-3)
