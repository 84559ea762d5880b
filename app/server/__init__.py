"""uvicorn, as the broker runs it."""
