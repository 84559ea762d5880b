"""Import this before structlog, to keep it from loading rich (4 MB, 30 ms) for tracebacks, which are plain here."""

import sys

if "structlog" not in sys.modules and "rich" not in sys.modules:
    sys.modules["rich"] = None  # type: ignore[assignment]
    import structlog  # noqa: F401

    del sys.modules["rich"]
