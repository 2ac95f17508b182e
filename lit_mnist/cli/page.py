"""export to .html: one file with a sketchpad, the network and ONNX Runtime Web, which needs no server.

page.html is the template; each part has its place there by name.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_mnist.exact.console import shortened
from lit_mnist.exact.errors import UserError
from lit_mnist.pictures.prepare import BOX, SIDE

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

RUNTIME = "onnxruntime-web@1.30.0"  # on the npm registry
FILES = {"runtime": "ort.wasm.bundle.min.mjs", "wasm": "ort-wasm-simd-threaded.wasm"}
CANVAS = 256  # pixels; `data.images.digit` reduces what is larger


class Drawing(nn.Module):
    """What `data.images.digit` makes of clean ink: uint8 (CANVAS, CANVAS), 255 full ink, to uint8 (1, 1, 28, 28).

    Each step is a product of matrices of fixed shapes, so that it can be exported. There must be some ink.
    """

    def forward(self, canvas: Tensor) -> Tensor:
        ink = canvas.float() / 255
        (above, height), (left, width) = (span(ink.amax(side) > 0.1) for side in (1, 0))
        scale = torch.maximum(height, width) / BOX
        rows, columns = (size / scale for size in (height, width))
        rows, columns = rows.round().clamp(min=1), columns.round().clamp(min=1)
        softness = 0.3 * scale
        ink = resampling(above, height, rows, softness) @ ink @ resampling(left, width, columns, softness).T
        ink = (ink / top(ink)).clamp(max=1)
        pixels = torch.arange(SIDE)
        down, right = (
            torch.minimum((SIDE / 2 - (ink.sum(side) * pixels).sum() / ink.sum()).round().clamp(min=0), SIDE - size)
            for side, size in ((1, rows), (0, columns))
        )
        ink = shift(down) @ ink @ shift(right).T
        return (ink * 255).round().to(torch.uint8)[None, None]


def span(inked: Tensor) -> tuple[Tensor, Tensor]:
    """The first of a mask's entries that is set, and how many there are from it to the last."""
    positions = torch.arange(len(inked))
    first = torch.where(inked, positions, len(inked)).amin(0)
    return first, torch.where(inked, positions, -1).amax(0) + 1 - first


def resampling(first: Tensor, size: Tensor, wanted: Tensor, softness: Tensor) -> Tensor:
    """The matrix (SIDE, CANVAS) that makes `wanted` pixels of `size`, as `data.images.in_form`: reduced by area after a
    Gaussian blur of that standard deviation, enlarged linearly.
    """
    scale = size / wanted
    source, target = torch.arange(CANVAS) - first, torch.arange(SIDE)[:, None]
    inside = (source >= 0) & (source < size)
    covered = torch.minimum(source + 1, (target + 1) * scale) - torch.maximum(source, target * scale)
    near = 1 - (source + 0.5 - (target + 0.5) * scale).abs()
    weights = torch.where(inside & (target < wanted), torch.where(scale > 1, covered, near).clamp(min=0), 0.0)
    # what lies beyond the ends is the mirror image of what lies within, as OpenCV has it
    radius, rows = ((8 * softness).round() / 2).floor(), source[:, None]
    blur = torch.where((source - rows).abs() <= radius, gaussian(source - rows, softness), 0.0)
    for mirrored, edge in ((-source, 0), (2 * (size - 1) - source, size - 1)):
        taps = (mirrored - rows).abs() <= radius
        blur = blur + torch.where(taps & (source != edge), gaussian(mirrored - rows, softness), 0.0)
    blur = torch.where(inside, blur, 0.0)
    blur = blur / blur.sum(1, keepdim=True).clamp(min=1e-6)
    weights = torch.where(scale > 1, weights @ blur, weights)
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-6)


def gaussian(distance: Tensor, deviation: Tensor) -> Tensor:
    return (-((distance / deviation) ** 2) / 2).exp()


def shift(pixels: Tensor) -> Tensor:
    positions = torch.arange(SIDE)
    return (positions[:, None] - positions == pixels).float()


def top(ink: Tensor) -> Tensor:
    """The 0.9 quantile of what is at least half as dark as the darkest, as `data.images.top`."""
    levels = ink.flatten().sort(descending=True).values
    place = 0.1 * ((levels >= 0.5 * levels[0]).sum() - 1)
    lower, upper = (levels.index_select(0, index.long()[None]) for index in (place.ceil(), place.floor()))
    return upper + (lower - upper) * (place - place.floor())


def runtime() -> dict[str, bytes]:
    """ONNX Runtime Web's files, from the npm registry.

    Raises:
        UserError: npm or its registry cannot be had.
    """
    with TemporaryDirectory(prefix="lit_mnist-") as folder:
        command = ["npm", "pack", RUNTIME, "--loglevel=error", "--pack-destination", folder]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder, timeout=300)
        except (subprocess.SubprocessError, OSError) as error:
            said = " ".join(str(getattr(error, "stderr", None) or error).split())
            raise UserError(f"npm cannot fetch {RUNTIME}: {shortened(said.replace('npm error ', ''), 120)}") from error
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as packed:
            found = {name: packed.extractfile(f"package/dist/{file}") for name, file in FILES.items()}
            return {name: content.read() for name, content in found.items() if content}


def write(path: Path, network: bytes, drawing: bytes, metadata: dict[str, str]) -> None:
    """Write the page of two ONNX models."""
    parts = runtime() | {"network": network, "drawing": drawing}
    page = Path(__file__).with_name("page.html").read_text().replace("{{side}}", str(CANVAS))
    for name, content in parts.items():
        page = page.replace(f"{{{{{name}}}}}", base64.b64encode(gzip.compress(content, mtime=0)).decode())
    page = page.replace("{{metadata}}", html.escape(json.dumps(metadata, indent=2), quote=False))
    path.write_text(page)


def check_tools() -> None:
    """
    Raises:
        UserError: a program that makes or checks a page is missing.
    """
    packages = {"npm": "npm", "chromium": "chromium", "chromedriver": "chromium-driver"}
    if missing := [name for name in packages if not shutil.which(name)]:
        debian = " ".join(packages[name] for name in missing)
        raise UserError(f"a page needs {' and '.join(missing)}: apt-get install {debian}, or as your system has it")


def chromium(profile: Path) -> Chrome:
    """A window that nobody sees, and a log of its requests.

    Args:
        profile: folder for Chromium's files.
    """
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    quiet = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    quiet += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"]
    for flag in [*quiet, "--window-size=1600,1200"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


@contextmanager
def opened(path: Path) -> Iterator[Callable[[Tensor], Tensor]]:
    """What a page's network answers in a browser: images uint8 (B, 1, 28, 28) to probabilities (B, C)."""
    with TemporaryDirectory(prefix="lit_mnist-") as profile:
        browser = chromium(Path(profile))
        try:
            browser.set_script_timeout(300)
            browser.get(path.resolve().as_uri())

            def answer(images: Tensor) -> Tensor:
                text = base64.b64encode(images.numpy().tobytes()).decode()
                found = browser.execute_async_script(ASK, text, len(images))
                if not isinstance(found, list):
                    raise UserError(f"the page's network fails in a browser: {shortened(str(found))}")
                return torch.tensor(found).view(len(images), -1)

            yield answer
        finally:
            browser.quit()


ASK = """
const [text, count, done] = arguments;
const images = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
page.then(({answers}) => answers(images, count)).then((found) => done(Array.from(found)), (error) => done(`${error}`));
"""
