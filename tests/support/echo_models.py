"""Models that answer with what they were asked, for the tests: each the code of a file that MLflow logs and runs.

A text that holds "fail" raises.
"""

HEAD = """
import json
import pandas as pd
import pydantic
from mlflow.models import set_model
from mlflow.pyfunc import ChatAgent, ChatModel, PythonModel, ResponsesAgent
from mlflow.types.agent import ChatAgentMessage, ChatAgentResponse
from mlflow.types.llm import ChatChoice, ChatCompletionResponse, ChatMessage, TokenUsageStats
from mlflow.types.responses import ResponsesAgentResponse

def echo(text, **given):
    if "fail" in text:
        raise ValueError("it was\\n told to")
    return f"{text} {json.dumps(given)}" if given else text
"""

CHAT_MODEL = """
class Echo(ChatModel):
    def predict(self, context, messages, params):
        text = echo(
            " | ".join(f"{message.role}: {message.content}" for message in messages),
            max_tokens=params.max_tokens, temperature=params.temperature, top_p=params.top_p, stop=params.stop,
        )
        return ChatCompletionResponse(
            choices=[ChatChoice(message=ChatMessage(role="assistant", content=text), finish_reason="length")],
            usage=TokenUsageStats(prompt_tokens=3, completion_tokens=4, total_tokens=7),
            model="echo",
        )
set_model(Echo())
"""

CHAT_AGENT = """
class Echo(ChatAgent):
    def predict(self, messages, context=None, custom_inputs=None):
        text = echo(" | ".join(f"{message.role}: {message.content}" for message in messages))
        thought = ChatAgentMessage(role="assistant", content="let me see", id="1")
        return ChatAgentResponse(messages=[thought, ChatAgentMessage(role="assistant", content=text, id="2")])
set_model(Echo())
"""

RESPONSES_AGENT = """
class Echo(ResponsesAgent):
    def predict(self, request):
        text = echo(
            " | ".join(f"{item.role}: {item.content}" for item in request.input),
            max_output_tokens=request.max_output_tokens, temperature=request.temperature, top_p=request.top_p,
        )
        reasoning = {"type": "reasoning", "id": "r", "summary": []}
        return ResponsesAgentResponse(
            output=[reasoning, self.create_text_output_item(text, "m")],
            status="incomplete",
            usage={
                "input_tokens": 5, "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": 6, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 11,
            },
        )
set_model(Echo())
"""

TABLE = """
class Echo(PythonModel):
    def predict(self, context, model_input, params=None):
        rows = model_input.to_dict(orient="records")
        return [echo(row.pop("question"), **row, **(params or {})) for row in rows]
set_model(Echo())
"""

ONE_TEXT_FOR_ALL = """
class Echo(PythonModel):
    def predict(self, context, model_input, params=None):
        return " + ".join(echo(text) for text in model_input["prompt"])
set_model(Echo())
"""

COLUMN = """
class Echo(PythonModel):
    def predict(self, context, model_input, params=None):
        return pd.DataFrame({"answer": [echo(text) for text in model_input.iloc[:, 0]]})
set_model(Echo())
"""

FUNCTION = """
def predict(model_input: list[str]) -> list[str]:
    return [echo(text) for text in model_input]
set_model(predict)
"""

RECORDS = """
class Message(pydantic.BaseModel):
    role: str
    content: str

class Request(pydantic.BaseModel):
    messages: list[Message]
    max_tokens: int | None = None

class Echo(PythonModel):
    def predict(self, model_input: list[Request]) -> list[str]:
        return [echo(row.messages[-1].content, max_tokens=row.max_tokens) for row in model_input]
set_model(Echo())
"""

MESSAGES = """
class Echo(PythonModel):
    def predict(self, context, model_input, params=None):
        [row] = model_input.to_dict(orient="records")
        return {"content": echo(row["messages"][-1]["content"], stream=bool(row["stream"]), n=row["n"])}
set_model(Echo())
"""

NO_TEXT = """
class Echo(PythonModel):
    def predict(self, context, model_input, params=None):
        return [None for _ in range(len(model_input))]
set_model(Echo())
"""

CONVERSATIONS = """
class Message(pydantic.BaseModel):
    role: str
    content: str

class Echo(PythonModel):
    def predict(self, model_input: list[list[Message]]) -> list[str]:
        return [echo(messages[-1].content) for messages in model_input]
set_model(Echo())
"""

NOT_LOADED = """
class Echo(PythonModel):
    def load_context(self, context):
        raise ImportError("no such library")
    def predict(self, context, model_input, params=None):
        return model_input
set_model(Echo())
"""
