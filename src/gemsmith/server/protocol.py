"""What clients of OpenAI's APIs send, as pydantic models.

A field that is not here is refused by name, unless it is null. Fields with `only` are known and can
be served with one value alone; `Ignored` ones change nothing here, whatever they hold.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

Ignored = Annotated[Any, Field(description="Accepted, and of no effect here.")]


class Strict(BaseModel):
    """Refuses fields it does not know. A null is as good as nothing."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None}


class Lenient(Strict):
    """Passes over fields it does not know: of things that clients echo with what others added."""

    model_config = ConfigDict(extra="ignore")


def checked(check: Callable[[Any], Any], **schema: Any) -> Any:
    """A check that comes before all others. schema: what the OpenAPI says of values that pass."""
    return BeforeValidator(check, json_schema_input_type=Annotated[Any, WithJsonSchema(schema)])


def only(*values: Any) -> Any:
    """A check that passes these values alone."""

    def check(value: Any) -> Any:
        if value not in values:
            allowed = " or ".join(repr(each) for each in values)
            raise ValueError(f"{value!r} cannot be served; leave it out (or {allowed})")
        return value

    return checked(check, enum=[*values, None])


Zero = Annotated[float | None, only(0, 0.0)]
No = Annotated[bool | None, only(False)]


def _no_bias(value: Any) -> Any:
    if value:
        raise ValueError("single tokens cannot be favoured; leave it out")
    return value


class Function(Lenient):
    """The declaration of a tool, or the name and arguments of a call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Ignored = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class CalledFunction(Lenient):
    name: str
    arguments: str | dict[str, Any] = ""


class Call(Lenient):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Lenient):
    """A message. What an assistant said before is given back as it came."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[Call] = []
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None


class NamedTool(Strict):
    type: Literal["function"]
    function: dict[Literal["name"], str]


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: No = None
    include_obfuscation: Ignored = None


class TemplateOptions(Strict):
    """vLLM's way to ask for thinking."""

    enable_thinking: bool | None = None
    preserve_thinking: bool = False


class Sampled(Strict):
    """What chat and plain completions have in common."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Annotated[dict[str, Any] | None, checked(_no_bias, enum=[{}, None])] = None
    user: Ignored = None

    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that were given."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop",
                 "ignore_eos", "max_tokens")  # fmt: skip
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    messages: list[Message]
    tools: list[Tool] = []
    tool_choice: Literal["auto", "none", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    response_format: dict[str, Any] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    reasoning_effort: str | None = None
    thinking_budget: int | None = Field(None, description="Most tokens of thought.")
    chat_template_kwargs: TemplateOptions | None = None
    mm_budget: int | Literal["auto"] | None = Field(
        None, description="Tokens that an image may cost: 70, 140, 280, 560, 1120 or auto."
    )
    modalities: Annotated[list[str] | None, only(["text"])] = None
    store: No = None
    service_tier: Annotated[str | None, only("auto", "default")] = None
    verbosity: Annotated[str | None, only("medium")] = None
    metadata: Ignored = None
    prediction: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    # Of a long list no more than one wrong kind is told: each would take as long as the pass.
    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True)]
        | Annotated[list[int], Field(fail_fast=True)]
        | Annotated[list[list[int]], Field(fail_fast=True)]
    )
    logprobs: int | None = None
    echo: No = None
    best_of: Annotated[int | None, only(1)] = None


class ResponsesTool(Strict):
    """A function tool of the Responses API; no other kind can run here, so that is asked first."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Ignored = None


class ResponsesNamedTool(Strict):
    type: Literal["function"]
    name: str


class Reasoning(Strict):
    effort: str | None = None
    summary: Ignored = None
    generate_summary: Ignored = None


class TextOptions(Strict):
    format: dict[str, Any] | None = None
    verbosity: Annotated[str | None, only("medium")] = None


class ResponsesRequest(Strict):
    """POST /v1/responses."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    tools: list[ResponsesTool] = []
    tool_choice: Literal["auto", "none", "required"] | ResponsesNamedTool = "auto"
    parallel_tool_calls: bool = True
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    thinking_budget: int | None = None
    mm_budget: int | Literal["auto"] | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    include: list[Annotated[str, only("reasoning.encrypted_content")]] = []
    store: No = None
    background: No = None
    truncation: Annotated[str | None, only("disabled")] = None
    service_tier: Annotated[str | None, only("auto", "default")] = None
    top_logprobs: Annotated[int | None, only(0)] = None
    metadata: Ignored = None
    user: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None
