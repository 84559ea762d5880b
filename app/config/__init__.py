"""Settings, agents and the rules for both."""
