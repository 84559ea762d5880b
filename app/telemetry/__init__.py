"""What operators see: logs, one line per request."""
