"""Real clients of OpenAI's API against a running server: LangChain, instructor, LiteLLM and Pydantic AI.

    pip install -r tests/support/clients.txt        in an environment of its own
    python benchmarks/clients.py http://127.0.0.1:5005/v1 MODEL [--tools] [--only=NAME]

Each client asks as its users write it, and prints one line. With `--tools`, the clients also call functions: the chat
template of the model must take them. tests/serving/test_clients.py runs the same.
"""

import argparse
import asyncio
import os
import sys

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else LiteLLM fetches a price list at its import

import openai
from pydantic import BaseModel, Field

QUESTION = "What is the capital of France? Answer in one sentence."
NAME = "Name the capital of France."
KEY = os.environ.get("PHI3_MLFLOW_API_KEY", "").split(",")[0].strip() or "none"


class City(BaseModel):
    """A city"""

    name: str = Field(max_length=20)


FUNCTION = {"name": "City", "description": "A city", "parameters": City.model_json_schema()}


def by_langchain(url: str, model: str, tools: bool) -> str:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    def chat(most: int = 20, **more) -> ChatOpenAI:
        return ChatOpenAI(base_url=url, api_key=KEY, model=model, temperature=0, max_tokens=most, **more)

    turns = [("system", "You are brief."), ("user", QUESTION)]
    whole = chat().invoke(turns)
    streamed = "".join(piece.content for piece in chat().stream(turns))
    assert streamed == whole.content and whole.usage_metadata["output_tokens"] > 0
    several = asyncio.run(chat().abatch([QUESTION] * 4))
    assert len({one.content for one in several}) == 1
    assert isinstance(chat(60).with_structured_output(City, method="json_schema").invoke(NAME), City)
    assert chat(use_responses_api=True).invoke(turns).text == whole.content
    with_logprobs = chat().bind(logprobs=True, top_logprobs=2).invoke(turns)
    assert "".join(one["token"] for one in with_logprobs.response_metadata["logprobs"]["content"]) == whole.content
    if tools:
        assert isinstance(chat(200).with_structured_output(City, method="function_calling").invoke(NAME), City)
        for responses in (False, True):
            bound = chat(200, use_responses_api=responses).bind_tools([City], tool_choice="City")
            asked = bound.invoke(NAME)
            [call] = asked.tool_calls
            assert City(**call["args"])
            pieces = None
            for piece in bound.stream(NAME):
                pieces = piece if pieces is None else pieces + piece
            assert [one["args"] for one in pieces.tool_calls] == [call["args"]]
            told = ToolMessage("known", tool_call_id=call["id"])
            back = chat(use_responses_api=responses).bind_tools([City])
            assert back.invoke([HumanMessage(NAME), asked, told]).usage_metadata["input_tokens"] > 20
        free = chat(200).bind_tools([City], strict=True, response_format=City).invoke(NAME)
        assert free.tool_calls or City.model_validate_json(free.content)
    return whole.content


def by_instructor(url: str, model: str, tools: bool) -> str:
    import instructor

    messages = [{"role": "user", "content": NAME}]
    for mode in [instructor.Mode.JSON_SCHEMA, *([instructor.Mode.TOOLS] if tools else [])]:
        client = instructor.from_openai(openai.OpenAI(base_url=url, api_key=KEY), mode=mode)
        options = {"model": model, "response_model": City, "messages": messages, "max_tokens": 200}
        city = client.chat.completions.create(**options)
        assert isinstance(city, City)
        *_, last = client.chat.completions.create_partial(**options)
        assert last.name == city.name
    return repr(city)


def by_litellm(url: str, model: str, tools: bool) -> str:
    import litellm

    messages = [{"role": "user", "content": QUESTION}]
    options = {"model": f"openai/{model}", "api_base": url, "api_key": KEY, "messages": messages, "max_tokens": 20}
    whole = litellm.completion(**options).choices[0].message.content
    chunks = litellm.completion(stream=True, **options)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == whole
    text = litellm.text_completion(
        model=f"text-completion-openai/{model}", api_base=url, api_key=KEY, prompt="One two three", max_tokens=4
    )
    assert text.choices[0].text
    newer = {"model": f"openai/{model}", "api_base": url, "api_key": KEY, "input": QUESTION}
    made = litellm.responses(**newer, max_output_tokens=20)
    assert made.output[0].content[0].text == whole
    if tools:
        choice = {"type": "function", "function": {"name": "City"}}
        forced = options | {
            "max_tokens": 200,
            "tools": [{"type": "function", "function": FUNCTION}],
            "tool_choice": choice,
        }
        [call] = litellm.completion(**forced).choices[0].message.tool_calls
        assert City.model_validate_json(call.function.arguments)
        deltas = [chunk.choices[0].delta for chunk in litellm.completion(stream=True, **forced)]
        pieces = [piece for delta in deltas for piece in delta.tool_calls or []]
        assert "".join(piece.function.arguments for piece in pieces) == call.function.arguments
        flat = {"tools": [{"type": "function", **FUNCTION}], "tool_choice": {"type": "function", "name": "City"}}
        [item] = litellm.responses(**newer, **flat, max_output_tokens=200).output
        assert City.model_validate_json(item.arguments)
    return whole


def by_pydantic_ai(url: str, model: str, tools: bool) -> str:
    from pydantic_ai import Agent, NativeOutput, ToolOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider, settings = OpenAIProvider(base_url=url, api_key=KEY), {"max_tokens": 200, "temperature": 0}
    said = []
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        agent = Agent(kind(model, provider=provider), instructions="You are brief.", model_settings=settings)
        said.append(agent.run_sync(QUESTION).output)
        for form in [NativeOutput(City), *([ToolOutput(City)] if tools else [])]:
            assert isinstance(agent.run_sync(NAME, output_type=form).output, City)
    assert said[0] == said[1]
    return said[0]


CLIENTS = {"LangChain": by_langchain, "instructor": by_instructor, "LiteLLM": by_litellm, "Pydantic AI": by_pydantic_ai}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--tools", action="store_true", help="also call functions")
    parser.add_argument("--only", choices=CLIENTS, default="", help="one client")
    args = parser.parse_args()
    failed = 0
    for name in [args.only] if args.only else CLIENTS:
        try:
            print(f"{name}: {CLIENTS[name](args.url, args.model, args.tools)}")
        except Exception as error:
            failed += 1
            print(f"{name}: failed, {type(error).__name__}: {error}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
