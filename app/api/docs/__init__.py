"""The OpenAPI explorer and its document."""
