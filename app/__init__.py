"""The OneInbox token broker: it keeps the API key on the server and hands browsers one call at a time."""

__version__ = "0.1.0"
