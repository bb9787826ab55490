"""The operator's parameters of `serve`: each has its effect in a real server, and a wrong one is refused at once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from support.commands import free_port, in_process, without_gpu
from support.openai_servers import LONG, NAME, ask, metric, serving
from support.questions import GENERATION, PARIS, text

from slm.base.errors import BadInput
from slm.serving import versions


def client_of(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)


def threads_of(process) -> int:
    return len([*Path(f"/proc/{process.pid}/task").iterdir()])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system does not list threads")
def test_limits_threads_and_batch_size_take_effect(store):
    with (
        serving(store, "--threads=6", "--batch_size=1", "--max_tokens=12") as (process, address),
        ThreadPoolExecutor(6) as pool,
    ):
        many, client = threads_of(process), client_of(address)
        answers = list(pool.map(lambda _: ask(client, LONG), range(6)))
        assert [answer.usage.completion_tokens for answer in answers] == [12] * 6  # no request says so
        texts = client.completions.create(model=NAME, prompt="Once upon a time, there was a")
        assert texts.usage.completion_tokens == 12
        for name in ("max_tokens", "max_completion_tokens"):
            with pytest.raises(openai.BadRequestError, match="13 is more than the 12 allowed here"):
                ask(client, **{name: 13})
        names = ("slm_joined_texts_total", "slm_batch_texts_sum", "slm_batch_texts_count")
        assert [metric(address, name) for name in names] == [0, 7, 7]
    with (
        serving(store, "--threads=1", "--batch_size=1", "--max_waiting=1", "--request_timeout=1") as (process, address),
        ThreadPoolExecutor(16) as pool,
    ):
        assert many - threads_of(process) >= 5
        client = client_of(address)

        def status(_) -> int:
            with pytest.raises(openai.APIStatusError) as raised:
                ask(client, LONG, max_tokens=4000)
            return raised.value.status_code

        assert set(pool.map(status, range(16))) == {429, 504}
        with pytest.raises(openai.APIError, match="not answered within 1 seconds"):
            list(ask(client, LONG, max_tokens=4000, stream=True))


def test_the_session_has_the_threads_and_the_wrapper_the_batch_size(store):
    import mlflow

    mlflow.set_tracking_uri(store[0])
    loaded = versions.load(store[1]["chat"], settings={"threads": 3, "batch_size": 5, "execution_provider": ""})
    assert loaded.wrapper._runtime._session.get_session_options().intra_op_num_threads == 3
    assert loaded.wrapper.batch_size == 5


@without_gpu
def test_a_model_that_was_logged_for_a_gpu_is_served_on_the_cpu(logged, wrapper, int4_export):
    import mlflow

    from slm.models import model_logging

    experiment = mlflow.get_experiment_by_name("wrappers").experiment_id
    with mlflow.start_run(experiment_id=experiment):
        info = model_logging.log_onnx(int4_export, "chat", GENERATION | {"execution_provider": "cuda"}, "int4")
    with pytest.raises(BadInput, match=r"model_uri: models:/m-\w+ can't be loaded: .*(?i:cuda)"):
        versions.load(info.model_uri)
    loaded = versions.load(info.model_uri, settings={"execution_provider": "cpu"})
    assert loaded.wrapper._runtime._session.get_providers() == ["CPUExecutionProvider"]
    [(_, [answer])] = loaded.wrapper.answers([{"messages": PARIS, "max_tokens": 12}], {})
    assert answer.text == text(wrapper.predict({"messages": PARIS, "max_tokens": 12})[0])


def test_a_setting_that_the_model_lacks_is_refused_before_it_is_loaded(logged):
    def never(size):
        raise AssertionError("the model is being loaded")

    with pytest.raises(BadInput, match=f"^execution_provider: {logged['pipeline']} has no such setting; leave it out"):
        versions.load(logged["pipeline"], before_loading=never, settings={"execution_provider": "cpu"})


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--max_tokens=0", "max_tokens: 0 is out of range; 1 to 1.04858e+06"),
        ("--max_waiting=0", "max_waiting: 0 is out of range; 1 to 100000"),
        ("--request_timeout=0", "request_timeout: 0 is out of range; 0.1 to 86400"),
        ("--request_timeout=soon", "request_timeout: 'soon' is not a number"),
        ("--threads=-1", "threads: -1 is out of range; 0 to 1024"),
        ("--batch_size=5000", "batch_size: 5000 is out of range; 0 to 4096"),
        ("--execution_provider=cda", "execution_provider: 'cda' is none of cpu, cuda; did you mean cuda?"),
        pytest.param(
            "--execution_provider=cuda",
            "execution_provider: 'cuda' needs an NVIDIA GPU, and nvidia-smi lists none; leave cpu",
            marks=without_gpu,
        ),
    ],
)
def test_a_wrong_value_is_one_line_before_the_model_is_loaded(tmp_path, option, told):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    port = f"--port={free_port()}"
    done = in_process("serve", "--model_uri=models:/x/1", port, option, MLFLOW_TRACKING_URI=store)
    assert (done.code, done.out, done.err) == (2, "", f"error: {told}\n")
    assert not [*tmp_path.iterdir()]
