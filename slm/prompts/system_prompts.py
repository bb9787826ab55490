"""The system message that the parameter `system_prompt` puts before the conversation of each row that has none.

A row with a system message keeps its own: other clients' prompts, such as traffic, often have one. The id of a row
stays as it is, so runs with two system prompts have the same rows. slm/tracking/system_text.py reads the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from slm.base.errors import BadInput
from slm.base.hashing import digest
from slm.base.wording import counted
from slm.prompts.prompt_rows import Prompt, conversation


@dataclass(frozen=True)
class SystemPrompt:
    """The text, and where it is: the resolved version in the registry, or the file as the user named it."""

    text: str
    source: str

    @property
    def sha256(self) -> str:
        return digest(self.text)


def added(prompt: Prompt, system: SystemPrompt | None) -> Prompt:
    """The prompt with the system message, unless the prompt has one."""
    messages = conversation(prompt)
    if system is None or _has_one(prompt):
        return prompt
    return replace(prompt, messages=({"role": "system", "content": system.text}, *messages), prompt=None)


def note(prompts: Sequence[Prompt], system: SystemPrompt) -> str:
    """A line on the rows that keep a system message of their own. "" if there is none.

    Raises:
        BadInput: all rows have one.
    """
    own = sum({"role": "system", "content": system.text} not in conversation(prompt) for prompt in prompts)
    if own == len(prompts):
        raise BadInput(f"system_prompt: each row has a system message already; leave {system.source} out")
    return f"{counted(own, 'row')} with a system message of its own, without {system.source}" if own else ""


def _has_one(prompt: Prompt) -> bool:
    return any(message["role"] == "system" for message in prompt.messages or ())
