"""The private network's web server: GET /bytes?num=N returns N zero bytes. The argument is the port number.

It sends READY=1 to NOTIFY_SOCKET, as the program's own services do.
"""

from __future__ import annotations

import os
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

_BLOCK = bytes(64 * 1024)


class Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6  # both families
    daemon_threads = True


class Zeros(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        target = urlsplit(self.path)
        if target.path != "/bytes":
            self.send_error(404)
            return
        remaining = int(parse_qs(target.query).get("num", ["1"])[0])
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(remaining))
        self.end_headers()
        while remaining > 0:
            self.wfile.write(_BLOCK[:remaining])
            remaining -= len(_BLOCK)


def main() -> None:
    server = Server(("::", int(sys.argv[1])), Zeros)
    if path := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(b"READY=1", path)
    server.serve_forever()


if __name__ == "__main__":
    main()
