"""Everything about a call after it exists."""
