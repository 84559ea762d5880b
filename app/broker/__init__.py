"""One running broker: its parts, how they are built and how they are closed."""
