"""What OneInbox and the control surface take. Unknown fields of OneInbox's bodies are ignored, as FastAPI does."""

from typing import Annotated, Any

from pydantic import AfterValidator, AnyHttpUrl, BaseModel, ConfigDict, Field, TypeAdapter

_url = TypeAdapter(AnyHttpUrl)


def _is_http_url(value: str) -> str:
    """`value` itself: AnyHttpUrl would give it back normalised, and OneInbox echoes what it was sent."""
    _url.validate_python(value)
    return value


class _UpstreamBody(BaseModel):
    # `model` is a field name of OneInbox's here, `model_` a prefix pydantic keeps for itself.
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class LlmOverrides(_UpstreamBody):
    provider: str | None = None
    model: str | None = None
    temperature: float | None = None
    system_prompt: str | None = None


class TranscriberOverrides(_UpstreamBody):
    model: str | None = None
    language: str | None = None


class TtsOverrides(_UpstreamBody):
    provider: str | None = None
    voice_id: str | None = None
    model: str | None = None
    speed: float | None = None
    stability: float | None = None


class Overrides(_UpstreamBody):
    llm: LlmOverrides | None = None
    transcriber: TranscriberOverrides | None = None
    tts: TtsOverrides | None = None
    first_message: str | None = None


class StartCall(_UpstreamBody):
    """Body of POST /v1/calls/web."""

    agent_id: str
    variables: dict[str, Any] | None = None
    overrides: Overrides | None = None
    metadata: dict[str, Any] | None = None


class RegisterWebhook(_UpstreamBody):
    """Body of POST /v1/webhooks."""

    name: str
    url: Annotated[str, AfterValidator(_is_http_url)]
    events: list[str]


class CallOverride(BaseModel):
    """Body of POST /_emulator/calls/{id}."""

    model_config = ConfigDict(extra="forbid")

    status: str | None = None
    """Any status, kept until told otherwise or stopped; `null`: back to the clock; absent: as it was."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Fields laid over the call's record, wherever it is answered."""
    remove: list[str] = Field(default_factory=list)
    """Fields left out of the record."""
