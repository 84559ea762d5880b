"""An offline OneInbox to develop and test against. It and the broker import nothing from each other."""
