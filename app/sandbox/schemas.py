"""Request bodies of OneInbox and of the control surface. OneInbox ignores unknown fields, as FastAPI does."""

from typing import Annotated, Any

from pydantic import AfterValidator, AnyHttpUrl, BaseModel, ConfigDict, Field, TypeAdapter

_url = TypeAdapter(AnyHttpUrl)


def _is_http_url(value: str) -> str:
    """Check `value` and return it unchanged: AnyHttpUrl would normalise it, and OneInbox echoes what it was sent."""
    _url.validate_python(value)
    return value


class _UpstreamBody(BaseModel):
    # OneInbox has a field `model`, and pydantic reserves the prefix `model_`.
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

    name: str = Field(min_length=1, max_length=255)
    url: Annotated[str, AfterValidator(_is_http_url)]
    events: list[str] = Field(min_length=1, max_length=20)


class CallOverride(BaseModel):
    """Body of POST /_emulator/calls/{id}."""

    model_config = ConfigDict(extra="forbid")

    status: str | None = None
    """Any status, kept until the next change or stop; `null`: back to the clock; absent: unchanged."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Fields that replace the record's own, in every answer."""
    remove: list[str] = Field(default_factory=list)
    """Fields left out of the record."""
