"""The OneInbox token broker: it keeps the API key on the server and hands browsers one call at a time."""

__version__ = "0.1.0"

import sys

# httpx loads its own command line wherever click and rich are installed: 3 MB and 30 ms for nothing.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
