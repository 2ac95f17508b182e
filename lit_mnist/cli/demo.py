"""demo: serves a page on which to draw digits or drop a photograph of some, with a network's answers."""

import base64
import gzip
import json
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_mnist.cli.predict import checkpoint_parser, open_network
from lit_mnist.data.datasets import SETS
from lit_mnist.exact.console import UserError
from lit_mnist.network import DIGITS
from lit_mnist.pictures.report import classify, most_spread, read


def fill_page(checkpoint: dict[str, Any], about: str, parts: dict[str, bytes] | None = None) -> bytes:
    """Fill in page.html: with PARTS it runs the network itself, without it asks the server that it came from."""
    packed = {name: base64.b64encode(gzip.compress(part, mtime=0)).decode() for name, part in (parts or {}).items()}
    settings, data = checkpoint["hyper_parameters"], str(checkpoint["datamodule_hyper_parameters"].get("name", "mnist"))
    names = list(SETS[data].names) if data in SETS else []  # the others are numbered
    limit = most_spread(settings["classes"], settings.get("label_smoothing", 0))
    filled = json.dumps({"names": names, "limit": limit, "about": about, "parts": packed or None})
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return page.replace("{{filled}}", filled.replace("<", r"\u003c")).encode()  # ends no script


class Handler(BaseHTTPRequestHandler):
    timeout = 60  # seconds, for each read and write

    def __init__(self, network: nn.Module, page: bytes, *connection: Any) -> None:
        self.network, self.page = network, page
        with suppress(ConnectionError):  # the browser has left
            super().__init__(*connection)  # which answers

    def parse_request(self) -> bool:
        """Refuse another name: a stranger's page could let its own lead here, and read the answers."""
        own = "localhost", "0.0.0.0", self.connection.getsockname()[0]  # the second as a browser writes it
        parsed = super().parse_request()
        if parsed and str(self.headers["Host"]).partition(":")[0] not in own:
            self.send_error(403)
            return False
        return parsed

    def do_GET(self) -> None:
        self.reply("text/html; charset=utf-8", self.page)

    def do_POST(self) -> None:
        """Answer in JSON: a `digit` of the page, uint8 (28, 28), or a picture in any format that `predict` reads."""
        length, found = self.headers["Content-Length"] or "", []
        content = self.rfile.read(int(length)) if length.isdecimal() and len(length) < 9 else b""
        if self.path == "/digit" and len(content) == prod(DIGITS):
            image = torch.tensor([*content], dtype=torch.uint8).view(1, *DIGITS)
            found = classify(self.network, image)[0].tolist()
        elif self.path in ("/picture", "/several") and content:
            for picture in read(self.network, BytesIO(content), self.path == "/several"):
                pixels = [] if picture.digit is None else picture.digit.flatten().tolist()
                found += [{"pixels": pixels, "probabilities": picture.probabilities, "problem": picture.row["problem"]}]
        else:
            return self.send_error(400)
        return self.reply("application/json", json.dumps(found).encode())

    def reply(self, kind: str, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Print no request."""


def demo(args: Sequence[str]) -> None:
    """Run the command with the flags after its name until Ctrl-C; UserError if they cannot be used."""
    parser = checkpoint_parser("demo", "Serve a page to draw digits on.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: for this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (7860), or 0 for any that is free")
    options = parser.parse_args(args)
    path, checkpoint, network = open_network(options)
    try:
        page = fill_page(checkpoint, f"Checkpoint: {path.name}")
        server = ThreadingHTTPServer((options.host, options.port), partial(Handler, network, page))
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {options.host} --port {options.port}: cannot listen there ({error})") from error
    with server:
        print(f"Draw at http://{options.host}:{server.server_port} (press Ctrl-C to stop)", flush=True)
        server.serve_forever()
