"""The drills' emulator: `python -m tests.faults.oneinbox OPTIONS` (JSON); prints its URL."""

import json
import sys
from typing import Any

from app.sandbox.emulator import EmulatorOptions
from app.sandbox.server import emulator_server
from app.server.server import listen, url_of
from tests.faults.rig import API_KEY


def main() -> None:
    """Serve until stopped."""
    given: dict[str, Any] = {"queued": 0, "initiated": 0, "in_progress": 1e6, **json.loads(sys.argv[1])}
    server = emulator_server(EmulatorOptions(api_key=API_KEY, **given))
    with listen("127.0.0.1", 0) as listener:
        sys.stdout.write(json.dumps({"event": "listening", "url": url_of(listener)}) + "\n")
        sys.stdout.flush()
        server.run(sockets=[listener])


if __name__ == "__main__":
    main()
