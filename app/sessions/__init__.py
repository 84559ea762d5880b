"""POST /session: start a call and return what a browser needs to join it."""
