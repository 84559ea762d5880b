"""An offline OneInbox to develop and test against. Imports nothing from the broker, and the broker nothing from it."""
