"""Dependencies of the routes."""

from typing import Annotated

from fastapi import Depends, Request

from app.broker.context import Broker


async def broker_of(request: Request) -> Broker:
    """Return the broker that received the request."""
    broker: Broker = request.state.broker
    return broker


BrokerDep = Annotated[Broker, Depends(broker_of)]
