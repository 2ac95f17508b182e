"""A source of data for the tests."""

from __future__ import annotations

import gzip
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Mirror:
    """A web server on this machine, with the contents as .gz files or what a test puts in their place."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        self.contents = {f"/{name}.gz": gzip.compress(content) for name, content in contents.items()}
        self.asked: list[str] = []
        self.endless = False
        self.pause = 0.0
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.asked.append(self.path)
                time.sleep(mirror.pause)
                self.send_response(200 if self.path in mirror.contents else 404)
                self.end_headers()
                self.wfile.write(mirror.contents.get(self.path, b""))
                while mirror.endless:
                    self.wfile.write(bytes(1 << 16))

            def log_message(self, *_: object) -> None: ...

            def handle(self) -> None:
                with suppress(BrokenPipeError, ConnectionResetError):  # the other end has had enough
                    super().handle()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
