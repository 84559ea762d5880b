"""The OneInbox token broker: it keeps the API key on the server and hands browsers one call at a time."""

__version__ = "0.1.0"

import sys

# httpx loads its own command line wherever click and rich are installed: 3 MB and 30 ms for nothing.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
# FastAPI looks whether a model is of pydantic's version 1, and knows that it may be missing: 1.5 MB and 20 ms.
sys.modules.setdefault("pydantic.v1", None)  # type: ignore[arg-type]
