"""`python range_server.py FOLDER PORT`: files over HTTP/1.1 on 127.0.0.1, by range. Prints its port; may be killed."""

from __future__ import annotations

import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class Handler(BaseHTTPRequestHandler):
    """GET of whole files (200) and of one range (206); 404 for what is not there."""

    protocol_version = "HTTP/1.1"
    folder = Path()

    def do_GET(self) -> None:
        path = self.folder / unquote(self.path.lstrip("/"))
        data = path.read_bytes() if path.is_file() else None
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        status, extra = 200, None
        if data is None:
            status, data = 404, b""
        elif asked is not None:
            first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
            status, extra = 206, f"bytes {first}-{last}/{len(data)}"
            data = data[first : last + 1]
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if extra is not None:
            self.send_header("Content-Range", extra)
        self.end_headers()
        self.wfile.write(data)
        if status == 200 and asked is None:
            print("whole", path.name, flush=True)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


if __name__ == "__main__":
    Handler.folder = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
