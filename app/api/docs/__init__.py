"""The OpenAPI explorer and the document that it shows."""
