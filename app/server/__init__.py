"""uvicorn, as the broker configures it."""
