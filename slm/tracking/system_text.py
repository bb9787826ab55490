"""Reads the text of the parameter `system_prompt`: of a version in MLflow's prompt registry, or of a file."""

from slm.base.errors import BadInput
from slm.base.wording import counted, one_line, quoted
from slm.prompts import readers
from slm.prompts.system_prompts import SystemPrompt
from slm.tracking import downloads, mlflow_client

REGISTRY = "prompts:/"
CHARACTERS = 100_000


def read(given: str) -> SystemPrompt | None:
    """The text of `prompts:/NAME/3`, of `prompts:/NAME@live`, or of a file. None if `given` is empty.

    Raises:
        BadInput: there is no such version or file, or it is not one plain text.
        Unavailable: the server that has the file fails.
    """
    if not given:
        return None
    if given.startswith(REGISTRY):
        text, source = _registered(given)
    else:
        with downloads.named_file("system_prompt", given) as path:
            text, source = readers.text_of(path).strip(), given
    if not text.strip() or "\0" in text:
        raise BadInput(f"system_prompt: {given} has no text, or one with a NUL character; write a text")
    if len(text) > CHARACTERS:
        raise BadInput(f"system_prompt: {given} has {counted(len(text), 'character')}; at most {CHARACTERS:,} are read")
    return SystemPrompt(text, source)


def _registered(given: str) -> tuple[str, str]:
    mlflow = mlflow_client.quiet_mlflow()
    try:
        found = mlflow.genai.load_prompt(given, link_to_model=False, cache_ttl_seconds=0)
    except mlflow.MlflowException as error:
        if mlflow_client.is_infrastructure(error):
            raise
        remedy = f"write {REGISTRY}NAME/3 or {REGISTRY}NAME@ALIAS"
        raise BadInput(f"system_prompt: {given} can't be read: {one_line(error)}; {remedy}") from None
    if not isinstance(found.template, str):
        raise BadInput(f"system_prompt: {found.uri} is a chat prompt of several messages; name a text prompt")
    if found.variables or "{%" in found.template:
        names = ", ".join(sorted(found.variables)) or "statements of Jinja"
        raise BadInput(f"system_prompt: {found.uri} has {quoted(names)} to fill in; register the finished text")
    return found.template, found.uri
