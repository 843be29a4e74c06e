"""The model hub of the drills, in a pod: the first word of a repository's owner says what trouble it has.

    good     none
    gated    nobody may read files
    private  nothing is told without a token
    broken   every answer is 503
    cut      the first download of the weights breaks off, half-way; cut-250-NAME: after 250 thousandths
    stalled  the first download of the weights stops half-way and stays so

Whoever asks for an image gets 401, as from a registry that wants a login. GET /sent/OWNER says how many bytes of the
weights went out. `hub.py FOLDER WEIGHTS PORT` runs with the standard library alone, beside hub_server.py of the
trainer's tests.
"""

import json
import re
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

from hub_server import Handler, HubServer

FOLDER, WEIGHTS, PORT = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
OWNER = re.compile(r"/((?:good|gated|private|broken|cut|stalled)(?:-[a-z0-9]+)*)(?:/|$)")
LOCK = threading.Lock()


def backend(owner: str) -> HubServer:
    """The state of an owner's repository. It listens on a port that nobody knows: the front asks it directly."""
    server = HubServer(FOLDER)
    server.repo = f"{owner}/tiny-llama"
    kind, _, rest = owner.partition("-")
    share = rest.partition("-")[0]
    half = (FOLDER / WEIGHTS).stat().st_size * (int(share) if share.isdigit() else 500) // 1000
    server.gated, server.private, server.broken = kind == "gated", kind == "private", kind == "broken"
    server.cut = {WEIGHTS: half} if kind == "cut" else {}
    server.stall = {WEIGHTS: half} if kind == "stalled" else {}
    return server


class Front(Handler):
    """Asks the owner's server."""

    backends: ClassVar[dict[str, HubServer]] = {}

    def do_GET(self) -> None:
        found = OWNER.search(self.path)
        owner = found[1] if found else "good"
        with LOCK:
            if owner not in self.backends:
                self.backends[owner] = backend(owner)
        self.server = self.backends[owner]
        if self.path.startswith("/sent/"):
            self._answer(200, json.dumps(self.server.sent.get(WEIGHTS, 0)))
        elif self.path.startswith("/v2/"):
            self._answer(401, '{"errors": [{"code": "UNAUTHORIZED", "message": "authentication required"}]}')
        else:
            super().do_GET()

    do_HEAD = do_GET

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


if __name__ == "__main__":
    ThreadingHTTPServer(("", PORT), Front).serve_forever()
