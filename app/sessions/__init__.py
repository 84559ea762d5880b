"""POST /session: a browser asks, and gets what it needs to join one call."""
