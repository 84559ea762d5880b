"""Request and response of POST /session: the broker's own fields and those of LiveKit's token request."""

from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError, to_json

from app.config.validation import MAX_VARIABLES, VariableName, VariableText, VariableValue

MAX_BODY = 16 * 1024
MAX_METADATA = 4 * 1024
RESERVED_PREFIX = "broker_"


def _check_metadata(value: dict[str, Any]) -> dict[str, Any]:
    if any(name.startswith(RESERVED_PREFIX) for name in value):
        raise PydanticCustomError("reserved_key", "Keys that start with broker_ are reserved")
    return value


Name = Annotated[str, StringConstraints(min_length=1, max_length=128)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class AgentDispatch(_Strict):
    """LiveKit's agent dispatch, as far as it applies here."""

    agent_name: Name | None = Field(default=None, description="Name of a configured agent.")
    metadata: str | None = Field(default=None, description="Stored in the call's metadata as `agent_metadata`.")


NO_DISPATCH = AgentDispatch()


class RoomConfig(_Strict):
    """LiveKit's room configuration: it only chooses the agent, since OneInbox assigns the room."""

    agents: list[AgentDispatch] | None = Field(default=None, max_length=1)


class SessionRequest(_Strict):
    """All fields are optional: an empty body starts a call with the default agent."""

    agent: Name | None = Field(
        default=None, description="Name of a configured agent; unless the operator named more, only `default`."
    )
    agent_id: Name | None = Field(default=None, description="The id of a configured agent, instead of its name.")
    variables: dict[VariableName, VariableValue] | None = Field(
        default=None,
        max_length=MAX_VARIABLES,
        description="Values for the agent's prompt: strings, numbers or booleans, at most 1,000 characters each, "
        "without `{{`, `}}` or control characters.",
        examples=[{"customer_name": "Ada"}],
    )
    metadata: Annotated[dict[str, Any], AfterValidator(_check_metadata)] | None = Field(
        default=None, description="Stored on the call record; at most 4 KiB as JSON, no keys that start with `broker_`."
    )
    overrides: dict[str, Any] | None = Field(
        default=None,
        description="Parts of the agent to replace; only what the operator allows.",
        examples=[{"first_message": "Hi!"}],
    )
    participant_name: str | None = Field(
        default=None, description="LiveKit: becomes the variable `participant_name` if allowed, else is dropped."
    )
    participant_identity: str | None = Field(
        default=None, description="LiveKit: must be the signed-in user's id; ignored in anonymous mode."
    )
    participant_metadata: str | None = Field(
        default=None, description="LiveKit: stored in the call's metadata as `participant_metadata`."
    )
    participant_attributes: dict[VariableName, VariableText] | None = Field(
        default=None, max_length=MAX_VARIABLES, description="LiveKit: more `variables`, under the same rules."
    )
    room_config: RoomConfig | None = Field(
        default=None, description="LiveKit: chooses the agent by `agents[0].agent_name`."
    )

    @property
    def all_variables(self) -> dict[str, str | float | bool]:
        """`participant_attributes` updated with `variables`, without `participant_name`, which the policy may drop."""
        return {**(self.participant_attributes or {}), **(self.variables or {})}

    @property
    def agent_name(self) -> str | None:
        """The requested agent's name, in either style."""
        return self.agent or self._dispatch.agent_name

    @property
    def all_metadata(self) -> dict[str, Any]:
        """`metadata` with LiveKit's two metadata texts."""
        livekit = {"participant_metadata": self.participant_metadata, "agent_metadata": self._dispatch.metadata}
        return {**(self.metadata or {}), **{name: text for name, text in livekit.items() if text is not None}}

    @property
    def _dispatch(self) -> AgentDispatch:
        agents = self.room_config and self.room_config.agents
        return agents[0] if agents else NO_DISPATCH

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.agent and self._dispatch.agent_name not in (None, self.agent):
            raise PydanticCustomError("contradiction", "agent and room_config.agents[0].agent_name differ")
        if len(self.all_variables) > MAX_VARIABLES:
            raise PydanticCustomError("too_long", "At most 32 variables are allowed, including participant_attributes")
        if (metadata := self.all_metadata) and len(to_json(metadata)) > MAX_METADATA:
            raise PydanticCustomError("too_long", "Metadata may have at most 4 KiB as JSON")
        return self


# A broker with default settings accepts each of them.
REQUESTS: dict[str, Any] = {
    "Empty: the default agent": {},
    "Values for the agent's prompt": {
        "variables": {"customer_name": "Ada", "order_count": 3, "premium": True},
        "metadata": {"page": "/pricing"},
    },
    "LiveKit's standard token request": {
        "participant_name": "Ada",
        "participant_metadata": "came from the pricing page",
        "participant_attributes": {"plan": "gold"},
        "room_config": {"agents": [{"agent_name": "default", "metadata": "from the page"}]},
    },
}


class Session(BaseModel):
    """The fields a browser needs to join the call: exactly those of LiveKit's standard token endpoint."""

    server_url: str = Field(description="Where to connect.")
    participant_token: str = Field(description="A short-lived token for this one call.")


ANSWERS = {
    "A call to join": {
        "server_url": "wss://voice.oneinbox.ai",
        "participant_token": "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.e30.c2lnbmF0dXJl",
    }
}
