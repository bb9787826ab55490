"""Real clients of OpenAI's API against a running server: LangChain's ChatOpenAI, instructor and LiteLLM.

    pip install langchain-openai instructor litellm        in an environment of its own
    python benchmarks/clients.py http://127.0.0.1:5005/v1 MODEL

Each client asks as its users write it, and prints one line. These packages bring many others along, so the tests do not
install them. The tests use the clients of OpenAI and MLflow's gateway.
"""

import asyncio
import os
import sys

import openai
from pydantic import BaseModel, Field

QUESTION = "What is the capital of France? Answer in one sentence."
KEY = os.environ.get("PHI3_MLFLOW_API_KEY", "").split(",")[0].strip() or "none"


class City(BaseModel):
    name: str = Field(max_length=20)


def by_langchain(url: str, model: str) -> str:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=url, api_key=KEY, model=model, temperature=0, max_tokens=20)
    whole = chat.invoke([("system", "You are brief."), ("user", QUESTION)])
    streamed = "".join(piece.content for piece in chat.stream([("system", "You are brief."), ("user", QUESTION)]))
    assert streamed == whole.content and whole.usage_metadata["output_tokens"] > 0
    several = asyncio.run(chat.abatch([QUESTION] * 4))
    assert len({one.content for one in several}) == 1
    longer = ChatOpenAI(base_url=url, api_key=KEY, model=model, temperature=0, max_tokens=60)
    city = longer.with_structured_output(City, method="json_schema").invoke("Name the capital of France.")
    assert isinstance(city, City)
    responses = ChatOpenAI(base_url=url, api_key=KEY, model=model, temperature=0, max_tokens=20, use_responses_api=True)
    assert responses.invoke([("system", "You are brief."), ("user", QUESTION)]).text == whole.content
    return whole.content


def by_instructor(url: str, model: str) -> str:
    import instructor

    client = instructor.from_openai(openai.OpenAI(base_url=url, api_key=KEY), mode=instructor.Mode.JSON_SCHEMA)
    messages = [{"role": "user", "content": "Name the capital of France."}]
    city = client.chat.completions.create(model=model, response_model=City, messages=messages, max_tokens=60)
    return repr(city)


def by_litellm(url: str, model: str) -> str:
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
    return whole


def main() -> None:
    url, model = sys.argv[1:]
    failed = 0
    for name, ask in (("LangChain", by_langchain), ("instructor", by_instructor), ("LiteLLM", by_litellm)):
        try:
            print(f"{name}: {ask(url, model)}")
        except Exception as error:
            failed += 1
            print(f"{name}: failed, {type(error).__name__}: {error}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
