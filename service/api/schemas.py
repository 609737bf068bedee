"""Request bodies. Unknown fields are ignored; known ones are checked, and the error names field, value and bound."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

TaskId = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,47}$", description="id of a task in the catalogue")]
RequestId = Annotated[str, Field(min_length=1, max_length=128, description="`id` of an earlier chat completion")]


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class TextPart(Body):
    type: Literal["text"]
    text: str


class FunctionCall(Body):
    name: str = Field(min_length=1, max_length=256)
    arguments: str = Field(description="JSON text")


class ToolCall(Body):
    id: str = Field(min_length=1, max_length=256)
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """A turn. Tool calls and their results are for engines that honour `tools`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=1_000)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: str | None = Field(None, max_length=256)

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing")
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or ())

    @property
    def of_tools(self) -> bool:
        return self.role == "tool" or bool(self.tool_calls)

    def turn(self) -> dict[str, Any]:
        """As the engine's server takes it: text content, and tool calls as they came."""
        tools = self.model_dump(include={"tool_calls", "tool_call_id"}, exclude_none=True)
        return {"role": self.role, "content": self.text if self.content is not None else None, **tools}


class SampleBounds(Body):
    """How many samples a vote may draw."""

    min: int | None = Field(None, ge=1)
    max: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> SampleBounds:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class DetotOptions(Body):
    """What this service offers beyond OpenAI's API."""

    task: TaskId | None = Field(None, description="skip classification and use this task")
    samples: Annotated[int, Field(ge=1)] | SampleBounds | None = Field(
        None, description="samples of the vote: a fixed number, or bounds; default: the task's plan"
    )
    temperature: float | None = Field(None, ge=0, le=2, description="temperature of the vote's samples")
    top_p: float | None = Field(None, gt=0, le=1, description="nucleus mass of the vote's samples")
    confidence: float | None = Field(
        None, gt=0.5, lt=1, description="stop drawing once the leader leads with this probability"
    )
    arm: Literal["control", "champion", "challenger"] | None = Field(
        None, description="default: by hash of the request; without a challenger, champion serves"
    )
    content: Literal["full", "answer"] = Field(
        "full", description="message content: the best sample's whole text, or the voted answer alone"
    )
    record: bool = Field(True, description="false: nothing about this request is stored")
    deadline: float | None = Field(
        None, ge=0.05, le=3_600, description="seconds; then the vote as it stands is returned"
    )


class StreamOptions(Body):
    include_usage: bool | None = None


class ChatRequest(Body):
    """OpenAI chat completion request, with this service's options under `detot`."""

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={
            "example": {
                "model": "default",
                "messages": [{"role": "user", "content": "I had 3 apples and bought 4 more. How many do I have?"}],
            }
        },
    )

    model: str = Field(min_length=1, max_length=256)
    messages: list[Message] = Field(min_length=1, max_length=1_000)
    n: int | None = Field(None, ge=1, description="above 1: that many raw samples, without a vote")
    temperature: float | None = Field(None, ge=0, le=2, description="for free text and raw samples")
    top_p: float | None = Field(None, gt=0, le=1, description="for free text and raw samples")
    max_tokens: int | None = Field(None, ge=1, le=1_000_000, description="longest completion, in tokens")
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000, description="the newer name of max_tokens")
    stop: (
        Annotated[str, Field(max_length=256)]
        | Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=16)]
        | None
    ) = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="makes the request repeatable")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    detot: DetotOptions | None = None
    # Fields that need an engine's help: other than neutral values are refused where the engine cannot honour them.
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    logit_bias: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    top_k: Any = None
    min_p: Any = None
    repetition_penalty: Any = None
    best_of: Any = None
    use_beam_search: Any = None
    ignore_eos: Any = None
    stop_token_ids: Any = None
    prompt_logprobs: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "top_k": (-1, 0),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "prompt_logprobs": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
}


class FeedbackRequest(Body):
    """A user's word on an earlier answer; at least one of `correct`, `answer`, `score`."""

    request_id: RequestId
    correct: bool | None = None
    answer: str | None = Field(None, min_length=1, max_length=2_000, description="the right answer")
    score: float | None = Field(None, ge=0, le=1)

    @model_validator(mode="after")
    def _something(self) -> FeedbackRequest:
        if self.correct is None and self.answer is None and self.score is None:
            raise ValueError("one of correct, answer, score is needed")
        return self


class ClassifyRequest(Body):
    text: str = Field(min_length=1)


class RollbackRequest(Body):
    to: int | None = Field(None, ge=0, lt=2**53, description="version to go back to; default: undo the last publish")
    reason: str = Field("", max_length=500)


class FreezeRequest(Body):
    frozen: bool = True
    reason: str = Field("", max_length=500)


class ReasonRequest(Body):
    reason: str = Field("", max_length=500, description="for the record")


class PinRequest(Body):
    version: int | None = Field(None, ge=0, lt=2**53, description="version to hold; default: the champion")
    reason: str = Field("", max_length=500)
