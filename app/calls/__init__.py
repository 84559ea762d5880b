"""Calls after their start: read, follow and stop."""
