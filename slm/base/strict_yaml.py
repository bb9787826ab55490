"""Reads safe YAML, and refuses duplicate keys, aliases and wrong tags, which readers misread."""

from collections.abc import Hashable
from typing import Any

import yaml

from slm.base.wording import quoted


def parse_yaml(text: str) -> object:
    """The value of a safe YAML text. Raises ValueError for duplicate keys, and for aliases: they can fill gigabytes."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
        raise ValueError(f"line {mark.line + 1}: {problem}" if mark else problem) from None
    except (AttributeError, LookupError, TypeError) as error:  # yaml's constructors, for a value with a wrong !!tag
        raise ValueError(f"a tagged value cannot be read: {error!r}") from None


class _StrictLoader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            problem = f"the alias *{event.anchor} is not accepted: write the value out"
            raise yaml.composer.ComposerError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):  # yaml itself refuses other keys
                if key in seen:
                    problem = f"the key {quoted(key)} is given twice"
                    raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)
