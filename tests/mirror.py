import gzip
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from lit_mnist.data.datasets import LOCK


def held(folder: Path) -> dict[str, object]:
    paths = [path for path in folder.iterdir() if path.name != LOCK]
    return {p.name: p.readlink() if p.is_symlink() else p.is_dir() or p.read_bytes() for p in paths}


class Handler(BaseHTTPRequestHandler):
    server: "Mirror"

    def do_GET(self) -> None:
        mirror, fault = self.server, self.server.fault
        mirror.asked.append(self.path)
        time.sleep(mirror.pause)
        content = mirror.contents.get(self.path, b"")
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(len(content)))
        if fault == "marked":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        if fault == "silent":
            time.sleep(5)
        self.wfile.write(content[: len(content) // 2] if fault == "truncate" else content)
        self.connection.close()

    def log_message(self, *_: object) -> None: ...


class Mirror(ThreadingHTTPServer):
    """A web server on this machine, with the contents as .gz files or what a test puts in their place.

    `fault` is what it does to a file: "truncate" ends in the middle of it, "silent" sends nothing after the headers,
    "marked" says that it is compressed in transit.
    """

    def __init__(self, contents: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.contents = {f"/{name}.gz": gzip.compress(content) for name, content in contents.items()}
        self.asked: list[str] = []
        self.fault, self.pause = "", 0.0  # seconds before each reply
        self.url = f"http://127.0.0.1:{self.server_port}/"
        Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_: object) -> None: ...  # the other end has had enough, or the connection was closed above

    def server_close(self) -> None:
        self.shutdown()
        super().server_close()
