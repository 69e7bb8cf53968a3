"""Real images: Fashion-MNIST from four idx files, else the digits that scikit-learn brings."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

PACKAGE = "dataset-fashion-mnist"
PACKAGE_FOLDER = Path("/usr/share/datasets/fashion-mnist")

CHECKSUMS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""SHA-256 of each file's uncompressed content."""

SPLIT_SEED = 2019
"""Of the one permutation that says which images are for validation, the same for every run."""


class DataError(Exception):
    """The images are not there, or are not what they should be; the message says what to do."""


@dataclass(frozen=True)
class Images:
    """Images of shape (n, 1, 28, 28), float32, and their labels of shape (n,), int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DataSet:
    """Three disjoint sets of images, standardized by the training pixels' mean and deviation."""

    name: str
    source: str
    train: Images
    validation: Images
    test: Images


def load(folder: Path | None, digits: bool, say: Callable[[str], None]) -> DataSet:
    """Load Fashion-MNIST, or the digits with the reason why.

    Parameters
    ----------
    folder : Path, optional
        Where the four idx files lie. Without it they come from Debian's package, which is installed
        if apt and the rights of this process allow.
    digits : bool
        Take the digits in any case.
    say : callable
        Takes each sentence on what is being done.

    Raises
    ------
    DataError
        If `folder` was given and does not hold the files: an explicit request never falls back.
    """
    if digits:
        return load_digits()
    if folder is not None:
        return load_fashion_mnist(folder)
    try:
        if not PACKAGE_FOLDER.is_dir():
            install_package(say)
        return load_fashion_mnist(PACKAGE_FOLDER)
    except DataError as error:
        say(f"Fashion-MNIST is not to be had: {error}")
        say("Taking scikit-learn's digits instead (--data DIR takes Fashion-MNIST's idx files).")
        return load_digits()


def install_package(say: Callable[[str], None]) -> None:
    """Install Debian's package of the images; a DataError says why it cannot be done."""
    if shutil.which("apt-get") is None:
        raise DataError(f"{PACKAGE_FOLDER} is not there, and there is no apt-get to install it")
    if os.geteuid() != 0:
        raise DataError(f"{PACKAGE_FOLDER} is not there, and apt-get install {PACKAGE} takes root")
    for arguments in (["update"], ["install", "--yes", "--no-install-recommends", PACKAGE]):
        command = ["apt-get", *arguments]
        say(f"Running: {' '.join(command)}")
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        )
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataError(f"{' '.join(command)} failed: {reason}")


def load_fashion_mnist(folder: Path) -> DataSet:
    """Read the four idx files in `folder`, compressed or not: 55,000 + 5,000 + 10,000 images."""
    arrays = {name: read_idx(folder, name, digest) for name, digest in CHECKSUMS.items()}
    train, validation = split(len(arrays["train-labels-idx1-ubyte"]), held_out=5000)
    images = torch.from_numpy(arrays["train-images-idx3-ubyte"])
    labels = torch.from_numpy(arrays["train-labels-idx1-ubyte"])
    return _standardize(
        "Fashion-MNIST",
        f"four idx files in {folder}, checksums verified",
        (images[train], labels[train]),
        (images[validation], labels[validation]),
        (
            torch.from_numpy(arrays["t10k-images-idx3-ubyte"]),
            torch.from_numpy(arrays["t10k-labels-idx1-ubyte"]),
        ),
    )


def load_digits() -> DataSet:
    """Load the 1,797 digits of 8x8 pixels that scikit-learn brings, enlarged: 1,197 + 300 + 300."""
    # Only where it is needed: scikit-learn brings an OpenMP runtime of its own beside torch's.
    from sklearn.datasets import load_digits as load_bundled  # type: ignore[import-untyped] # noqa: PLC0415

    digits = load_bundled()
    small = torch.from_numpy(digits.images).float().unsqueeze(1)
    images = interpolate(small, size=(28, 28), mode="bilinear").squeeze(1)
    labels = torch.from_numpy(digits.target)
    rest, test = split(len(labels), held_out=300)
    train, validation = (rest[part] for part in split(len(rest), held_out=300))
    return _standardize(
        "scikit-learn digits",
        "bundled with scikit-learn, 8x8 pixels enlarged to 28x28",
        *((images[part], labels[part]) for part in (train, validation, test)),
    )


def read_idx(folder: Path, name: str, digest: str) -> NDArray[np.uint8]:
    """Read an array of bytes from the idx file `name` or `name`.gz in `folder`.

    Raises
    ------
    DataError
        If the file is not there, or if the SHA-256 of its uncompressed content is not `digest`.
    """
    plain, compressed = folder / name, folder / f"{name}.gz"
    try:
        content = (
            plain.read_bytes() if plain.is_file() else gzip.decompress(compressed.read_bytes())
        )
    except FileNotFoundError as error:
        raise DataError(f"{folder} holds neither {name} nor {name}.gz") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name} in {folder} cannot be read: {error}") from error
    if (found := hashlib.sha256(content).hexdigest()) != digest:
        raise DataError(
            f"{name} in {folder} is not Fashion-MNIST's: its uncompressed content has SHA-256 "
            f"{found}, expected {digest}"
        )
    return parse_idx(content)


def parse_idx(content: bytes) -> NDArray[np.uint8]:
    """Parse idx: two zeros, the type (8: bytes), the rank, big-endian sizes, the values."""
    zeros, kind, rank = content[:2], content[2], content[3]
    if zeros != b"\0\0" or kind != 8:
        raise DataError(f"an idx file of bytes begins with 00 00 08, got {content[:3].hex(' ')}")
    start = 4 + 4 * rank
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], dtype=">u4"))
    values = np.frombuffer(content[start:], dtype=np.uint8)
    if values.size != np.prod(shape):
        raise DataError(f"an idx file of shape {shape} holds {values.size} values")
    return values.reshape(shape).copy()


def split(count: int, held_out: int) -> tuple[Tensor, Tensor]:
    """Divide the indices below `count` into those kept and `held_out` others, always the same."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))
    return order[held_out:].sort().values, order[:held_out].sort().values


def _standardize(name: str, source: str, *sets: tuple[Tensor, Tensor]) -> DataSet:
    pixels = sets[0][0].float()
    deviation, mean = torch.std_mean(pixels)
    train, validation, test = (
        Images(((images.float() - mean) / deviation).unsqueeze(1), labels.long())
        for images, labels in sets
    )
    return DataSet(name, source, train, validation, test)
