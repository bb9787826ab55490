"""Versions of the registered model `bot`, its alias, and clients that ask while the alias moves."""

import threading
import time
from pathlib import Path

import mlflow
import openai
from support.questions import GENERATION

from slm.tracking import registry

ALIAS = "models:/bot@champion"


def log(export, experiment: str) -> str:
    """Logs the int4 model under the registered name `bot`, and gives its version."""
    from slm.models import model_logging

    found = mlflow.get_experiment_by_name(experiment)
    with mlflow.start_run(experiment_id=found.experiment_id if found else mlflow.create_experiment(experiment)):
        info = model_logging.log_onnx(export, "chat", GENERATION, "int4", registered_model_name="bot")
    return str(info.registered_model_version)


def champion(version: str) -> None:
    registry.set_alias("bot", "champion", version)


def damage(folder: Path) -> None:
    """Exchanges a byte of a logged model's weights. Other links to the file stay as they are."""
    [weights] = folder.rglob("model.onnx.data")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 255
    weights.unlink()
    weights.write_bytes(content)


def source_of(version: str) -> str:
    """The id of a version's LoggedModel."""
    return registry.version_source(f"models:/bot/{version}").removeprefix("models:/")


class Clients:
    """So many clients of the openai library in a closed loop. Each answer is kept with its begin and its version."""

    def __init__(self, address: str, number: int, key: str = "none"):
        self.answers: list[tuple[float, str, str]] = []  # (begin, fingerprint, header)
        self.failed: list[str] = []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(address, at, key)) for at in range(number)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        for thread in self._threads:
            thread.join(120)

    def wait_for(self, number: int) -> None:
        """Until there are so many answers."""
        for _ in range(1200):
            if len(self.answers) >= number:
                return
            time.sleep(0.1)
        raise AssertionError(f"{len(self.answers)} of {number} answers; {self.failed[:3]}")

    def _ask(self, address: str, at: int, key: str) -> None:
        with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=120) as client:
            turn = 0
            while not self._ended.is_set():
                turn += 1
                question = [{"role": "user", "content": f"Count from {at} to {turn}."}]
                begin = time.time()
                try:
                    told = client.chat.completions.with_raw_response.create(
                        model="bot", messages=question, max_tokens=12
                    )
                    self.answers.append((begin, told.parse().system_fingerprint, told.headers["x-model-version"]))
                except openai.OpenAIError as error:
                    self.failed.append(f"{type(error).__name__}: {error}")
