"""The broker with a second's patience at its end instead of GRACE: `python -m tests.support.hasty serve`."""

from app.cli.commands import main
from app.server import server

server.GRACE = 1

if __name__ == "__main__":
    main()
