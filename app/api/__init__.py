"""Everything HTTP: routes, middleware, error answers, the OpenAPI document. Nothing below imports it."""
