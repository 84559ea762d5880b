"""The HTTP layer: routes, middleware, error responses, the OpenAPI document."""
