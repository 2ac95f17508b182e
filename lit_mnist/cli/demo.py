"""demo: serves a page on which to draw a digit or drop a photograph of one, with a network's answers."""

import html
import json
from collections.abc import Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

from torch import nn

from lit_mnist.cli.predict import checkpoint_parser, open_network
from lit_mnist.exact.console import UserError
from lit_mnist.pictures.report import read


class Handler(BaseHTTPRequestHandler):
    def __init__(self, network: nn.Module, page: bytes, *connection: Any) -> None:
        self.network, self.page = network, page
        super().__init__(*connection)  # which answers

    def do_GET(self) -> None:
        self.reply("text/html; charset=utf-8", self.page)

    def do_POST(self) -> None:
        """Answer a drawing or a photograph, in any format that `predict` reads, in JSON."""
        size = min(int(self.headers["Content-Length"]), 2**26)
        (picture,) = read(self.network, BytesIO(self.rfile.read(size)))
        pixels = [] if picture.digit is None else picture.digit.flatten().tolist()
        found = {"pixels": pixels, "probabilities": picture.probabilities, "problem": picture.problem}
        self.reply("application/json", json.dumps(found).encode())

    def reply(self, kind: str, content: bytes) -> None:
        """Answer, except under another name: a stranger's page could let its own lead here, and read the answers."""
        own = "localhost", self.connection.getsockname()[0]
        known = str(self.headers["Host"]).partition(":")[0] in own
        self.send_response(200 if known else 403)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(content if known else b"")

    def log_message(self, *args: Any) -> None:
        """Print no request."""


def demo(args: Sequence[str]) -> None:
    """Run the command with the flags after its name until Ctrl-C; UserError if they cannot be used."""
    parser = checkpoint_parser("demo", "Serve a page to draw digits on.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: for this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (7860), or 0 for any that is free")
    options = parser.parse_args(args)
    path, _, network = open_network(options)
    try:
        page = Path(__file__).with_name("page.html").read_text().replace("{{checkpoint}}", html.escape(path.name))
        server = ThreadingHTTPServer((options.host, options.port), partial(Handler, network, page.encode()))
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {options.host} --port {options.port}: cannot listen there ({error})") from error
    with server:
        print(f"Draw at http://{options.host}:{server.server_port} (press Ctrl-C to stop)", flush=True)
        server.serve_forever()
