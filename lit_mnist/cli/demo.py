"""demo: a page on this machine to draw a digit on, or to drop a photograph of one, and what a network reads."""

from __future__ import annotations

import base64
import html
import io
import os
import signal
import socket
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import sleep
from types import FrameType
from typing import Any, NoReturn

import torch
from PIL import Image, ImageDraw, ImageFont

from lit_mnist.cli.console import OneLineParser, complain
from lit_mnist.cli.export import Probabilities, restored
from lit_mnist.data import datasets
from lit_mnist.exact.console import shortened, shown
from lit_mnist.exact.errors import UserError
from lit_mnist.exact.reader import find_and_read, read_checkpoint
from lit_mnist.exact.runs import newest, read_results, run_folder, section, text, versions
from lit_mnist.pictures import prepare as images
from lit_mnist.pictures.prepare import Picture

SIDE = 320  # of the sketchpad, in pixels; a telephone has at least 360
PHOTOGRAPH_LIMIT = 20 * 2**20  # bytes
RUNS_SHOWN = 20
CSS = """
.gradio-container { width: 100%; max-width: 860px !important; margin: auto }
#photograph img { width: 100%; object-fit: contain }
#seen img { width: 140px; margin: 28px 0 0 8px; image-rendering: pixelated; border: 1px solid #808080 }
"""
# The sketchpad of gradio 6.31 waits for a tool to be chosen, also after each clearing; and with a value to begin with,
# which chooses one, it swallows the first stroke.
TAKE_PEN = """() => { setInterval(() => {
  if (document.querySelector("#sketch .empty")) document.querySelector("#sketch [aria-label=Brush]")?.click();
}, 100); }"""


@lru_cache(maxsize=4)
def network(checkpoint: Path) -> Probabilities:
    return Probabilities(restored(read_checkpoint(checkpoint), checkpoint.name).network).eval()


def answer(picture: Picture | None, checkpoint: str) -> tuple[dict[str, float] | None, str]:
    """The probabilities by class, and as HTML the image that the network saw; or why there is no answer."""
    if picture is None or picture.digit is None:
        return None, html.escape(picture.problem) if picture else ""
    try:
        with torch.inference_mode():
            probabilities = network(Path(checkpoint))(picture.digit[None])[0].tolist()
    except UserError as error:  # perhaps its run has gone on and replaced it
        return None, html.escape(str(error))
    content = io.BytesIO()
    Image.fromarray(picture.digit[0].numpy()).save(content, format="PNG")
    source = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    return {str(digit): p for digit, p in enumerate(probabilities)}, f'<img src="{source}" alt="28x28 pixels">'


def drawn(sketch: dict[str, Any] | None) -> Picture | None:
    """What a sketchpad holds, `composite` uint8 (H, W)."""
    if not sketch or sketch["composite"] is None:
        return None
    try:
        return Picture(Path("drawing"), images.digit(torch.from_numpy(sketch["composite"]) / 255))
    except images.UnusableError as error:
        return Picture(Path("drawing"), problem=str(error))


def dropped(photograph: dict[str, Any] | None) -> Picture | None:
    """A file, as `predict` reads it."""
    return images.load(Path(photograph["path"])) if photograph else None


def examples(root: str, checkpoint: dict[str, Any], folder: Path) -> list[str]:
    """A file for each class: the first of the test set, where that is at hand; else digits in print."""
    try:
        name = str(checkpoint["datamodule_hyper_parameters"].get("name", "mnist"))
        pixels, targets = datasets.load(root, train=False, name=name)
        pictures = [Image.fromarray(pixels[targets == label][0, 0].numpy()) for label in targets.unique()]
    except (UserError, KeyError):
        pictures = [Image.new("L", (64, 64), "white") for _ in range(10)]
        for digit, picture in enumerate(pictures):
            ImageDraw.Draw(picture).text((32, 32), str(digit), "black", ImageFont.load_default(48), anchor="mm")
    paths = [str(folder / f"{label}.png") for label in range(len(pictures))]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    return paths


def named(checkpoint: Path) -> str:
    run = run_folder(checkpoint)
    if not run:
        return shown(checkpoint)
    recipe = text(section(read_results(run), "fit"), "recipe") or "unknown"
    return f"{run.name}: {shortened(recipe, 40)}, {checkpoint.stem.partition('-')[0]}"


def page(checkpoints: list[tuple[str, str]], pictures: list[str]) -> Any:
    """The page, as gradio's Blocks.

    Args:
        checkpoints: their names and files, the chosen one first.
        pictures: the examples' files.
    """
    import gradio as gr

    pen = gr.Brush(default_size=12, colors=["#000000"], color_mode="fixed")
    look: dict[str, Any] = {"show_label": False, "height": SIDE + 80, "buttons": []}
    with gr.Blocks(title="lit_mnist", analytics_enabled=False, delete_cache=(30, 60)) as blocks:
        last = gr.State()
        with gr.Row():
            with gr.Column():
                with gr.Tabs() as tabs:
                    with gr.Tab("Draw"):
                        sketch = gr.Sketchpad(
                            image_mode="L", canvas_size=(SIDE, SIDE), brush=pen, layers=False, transforms=(),
                            elem_id="sketch", **look,
                        )  # fmt: skip
                    with gr.Tab("Photograph", id="photograph"):
                        photograph = gr.Image(sources=["upload", "clipboard"], elem_id="photograph", **look)
                seen = gr.HTML(label="What the network saw", show_label=True, container=True, elem_id="seen")
            with gr.Column():
                label = gr.Label(label="Answer", num_top_classes=10)
                choice = gr.Dropdown(checkpoints, value=checkpoints[0][1], label="Network")
        clicked = gr.Examples([[path] for path in pictures], photograph, label="Examples", examples_per_page=50)

        event: dict[str, Any] = {"outputs": [label, seen, last], "show_progress": "hidden"}
        event |= {"trigger_mode": "always_last", "api_visibility": "private"}
        sketch.change(lambda value, name: (*answer(found := drawn(value), name), found), [sketch, choice], **event)
        photograph.change(
            lambda value, name: (*answer(found := dropped(value), name), found),
            [photograph, choice],
            preprocess=False,  # gradio would open it, whatever its size and form
            **event,
        )
        choice.change(lambda found, name: (*answer(found, name), found), [last, choice], **event)
        clicked.load_input_event.then(lambda: gr.Tabs(selected="photograph"), None, tabs, show_progress="hidden")
        blocks.load(js=TAKE_PEN)
    return blocks


def serve(blocks: Any, host: str, port: int) -> None:
    """Until a signal comes."""
    import gradio as gr

    nowhere: dict[str, Any] = {"share": False, "enable_monitoring": False, "run_history": False, "mcp_server": False}
    nowhere |= {"ssr_mode": False, "pwa": False, "allowed_paths": [], "footer_links": []}
    fonts = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # its own come from Google
    address = f"http://{host}:{port}"
    try:
        blocks.launch(
            server_name=host, server_port=port, max_file_size=PHOTOGRAPH_LIMIT, theme=fonts, css=CSS,
            prevent_thread_lock=True, quiet=True, **nowhere,
        )  # fmt: skip
        print(f"Draw at {address} (Ctrl-C ends it)", flush=True)
        while True:
            sleep(1)
    finally:
        blocks.close(verbose=False)


def demo(args: Sequence[str]) -> None:
    """Run the command with the flags that follow its name.

    Raises:
        UserError: the input cannot be used.
        SystemExit: from `--help`, and where a signal ended it.
    """
    parser = OneLineParser(prog="python -m lit_mnist demo", description="Serve a page to draw digits on.")
    parser.add_argument("--ckpt_path", required=True, metavar="best|last|PATH", help="the checkpoint")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: for this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (7860), or 0 for any that is free")
    parser.add_argument("--data.root", dest="root", default="data", help="folder of the data, for the examples (data)")
    parser.add_argument("--root_dir", type=Path, default=Path(), help="the folder of lightning_logs (this one)")
    options = parser.parse_args(args)
    if find_spec("gradio") is None:
        raise UserError("demo needs gradio: pip install 'lit_mnist[demo]'")
    runs = options.root_dir / "lightning_logs"
    path, checkpoint = find_and_read(options.ckpt_path, runs)
    restored(checkpoint, path.name)
    try:
        with socket.create_server((options.host, options.port)) as server:
            port = server.getsockname()[1]
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {options.host} --port {options.port}: cannot listen there ({reason})") from error
    print(f"Checkpoint: {path}", flush=True)
    others = [newest(run, "best") or newest(run) for run in versions(runs)[:RUNS_SHOWN]]
    files = dict.fromkeys(file.resolve() for file in (path, *others) if file)

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # `timeout` sends two at once
        raise SystemExit(complain(f"stopped by {signal.Signals(signum).name}", 128 + signum))

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        with TemporaryDirectory(prefix="lit_mnist-") as folder:
            os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "NO_PROXY": "*"}
            blocks = page(
                [(named(file), str(file)) for file in files], examples(options.root, checkpoint, Path(folder))
            )
            serve(blocks, options.host, port)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
