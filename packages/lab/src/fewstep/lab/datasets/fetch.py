"""Brings published data sets from where they are published: `fewstep data fetch`."""

from __future__ import annotations

import hashlib
import urllib.request
from pathlib import Path
from urllib.error import URLError

from fewstep.lab.config import ConfigError
from fewstep.lab.datasets import cifar10, mnist

# data.name -> file -> address. Checksums are those that `mnist` and `cifar10` ask for whenever they read.
SOURCES = {
    "cifar10": {"cifar-10-binary.tar.gz": "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"},
    "mnist": {f"{name}.gz": f"https://ossci-datasets.s3.amazonaws.com/mnist/{name}.gz" for name in mnist.SHA256},
}
BLOCK = 1 << 20


class FetchError(RuntimeError):
    """A file could not be brought; nothing of it is left."""


def fetch(name: str, folder: Path) -> list[Path]:
    """Bring what is not there yet into `folder`; returns the files that were brought, each with the right checksum.

    Raises:
        ConfigError: not a set that can be fetched. FetchError: no network, or another checksum.
    """
    if name not in SOURCES:
        raise ConfigError(f"NAME={name}: must be one of {', '.join(SOURCES)}")
    folder.mkdir(parents=True, exist_ok=True)
    missing = {file: address for file, address in SOURCES[name].items() if not (folder / file).exists()}
    return [_bring(name, address, folder / file) for file, address in missing.items()]


def _bring(name: str, address: str, path: Path) -> Path:
    partial = path.with_name(f"partial-{path.name}")
    try:
        with urllib.request.urlopen(address, timeout=60) as source, partial.open("wb") as target:
            while block := source.read(BLOCK):
                target.write(block)
        _check(name, partial, path.name)
        partial.replace(path)
    except (URLError, TimeoutError, ConnectionError) as error:
        raise FetchError(f"{address}: cannot be had ({error}); bring it to {path} by other means") from error
    except ConfigError as error:
        raise FetchError(f"{address}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _check(name: str, path: Path, called: str) -> None:
    if name == "mnist":
        mnist.read_idx(path, called.removesuffix(".gz"))
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    if digest != cifar10.MD5[called]:
        raise ConfigError(f"MD5 is {digest}, must be {cifar10.MD5[called]}")
