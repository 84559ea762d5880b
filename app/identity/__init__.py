"""Identify the user of a request."""

from app.identity.user import User

__all__ = ["User"]
