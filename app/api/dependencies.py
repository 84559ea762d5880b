"""What a route may ask for."""

from typing import Annotated

from fastapi import Depends, Request

from app.broker.context import Broker


async def broker_of(request: Request) -> Broker:
    """The broker that a request came to."""
    broker: Broker = request.state.broker
    return broker


BrokerDep = Annotated[Broker, Depends(broker_of)]
