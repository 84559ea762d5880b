"""One running broker: built from its settings, handed to routes, closed again."""
