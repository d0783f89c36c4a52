"""CIFAR-10 and MNIST in every form that is handed out: pixels, labels, checksums, and what is no such file."""

import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lab_configs import DIGITS
from PIL import Image

from fewstep.lab.compose import compose
from fewstep.lab.config import Config, ConfigError
from fewstep.lab.data import Data, load_data
from fewstep.lab.datasets import cifar10, files, mnist

EACH = 20  # images of a batch
NAMES = [*cifar10.TRAIN, cifar10.TEST]
IMAGES = np.random.default_rng(0).integers(0, 256, (6, EACH, 32, 32, 3), dtype=np.uint8)
LABELS = np.random.default_rng(1).permuted(np.tile(np.arange(10), (6, EACH // 10)), axis=1)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of 100 and 20 images are whole."""
    monkeypatch.setattr(cifar10, "COUNTS", (5 * EACH, EACH))
    for name in ("cifar10", "cifar10_unconditional", "cifar10_jpeg"):
        monkeypatch.setitem(files.PUBLISHED, name, replace(files.PUBLISHED[name], heldout=EACH))
    files._published.cache_clear()


def loaded(name: str, folder: Path, *overrides: str) -> Data:
    files._published.cache_clear()
    return load_data(composed(name, folder, *overrides).data)


def composed(name: str, folder: Path, *overrides: str) -> Config:
    more = [f"data={name}", f"data.files.path={folder}", f"data.heldout={EACH}", *overrides]
    return compose(DIGITS, ["preset=debug", *more])


def binary(number: int) -> bytes:
    """Label, then all of red, of green, of blue, each row by row: said in loops, as the format's page says it."""
    out = bytearray()
    for image, label in zip(IMAGES[number], LABELS[number], strict=True):
        out.append(label)
        for channel in range(3):
            for row in range(32):
                out += bytes(image[row, :, channel].tolist())
    return bytes(out)


class Python2(pickle._Pickler):
    """Strings and bytes as Python 2 wrote them, which made the published batches."""

    def save_string(self, value: str | bytes) -> None:
        content = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(value)

    dispatch = {**pickle._Pickler.dispatch, str: save_string, bytes: save_string}  # noqa: RUF012 - pickle's own way


def python(number: int) -> bytes:
    rows = np.array([np.concatenate([image[:, :, c].ravel() for c in range(3)]) for image in IMAGES[number]])
    out = io.BytesIO()
    batch = {"batch_label": "b", "labels": LABELS[number].tolist(), "data": rows, "filenames": ["x"]}
    Python2(out, protocol=2).dump(batch)
    return out.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def write(form: cifar10.Form, folder: Path, content: Callable[[int], bytes], packed: bool) -> dict[str, str]:
    """A form of the set in `folder`; MD5 of what has one."""
    contents = {name: content(number) for number, name in enumerate(NAMES)}
    md5 = {name: hashlib.md5(each).hexdigest() for name, each in contents.items()}
    if packed:
        with tarfile.open(folder / form.archive, "w:gz") as archive:
            for name, each in contents.items():
                member = tarfile.TarInfo(f"{form.folder}/{name}{form.suffix}")
                member.size = len(each)
                archive.addfile(member, io.BytesIO(each))
        return {**md5, form.archive: hashlib.md5((folder / form.archive).read_bytes()).hexdigest()}
    (folder / form.folder).mkdir()
    for name, each in contents.items():
        (folder / form.folder / f"{name}{form.suffix}").write_bytes(each)
    return md5


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("form", "content"), [(cifar10.FORMS[0], binary), (cifar10.FORMS[1], python)])
def test_cifar10_is_the_same_from_every_form(
    form: cifar10.Form, content: Callable[[int], bytes], packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Broken: colours or rows are swapped, labels are another image's, the test set is trained on.
    monkeypatch.setattr(cifar10, "MD5", write(form, tmp_path, content, packed))
    data = loaded("cifar10", tmp_path)
    expected = torch.tensor(IMAGES).permute(0, 1, 4, 2, 3)
    assert torch.equal(data.train.images, expected[:5].flatten(0, 1))
    assert torch.equal(data.heldout.images, expected[5])
    assert data.train.labels.tolist() == LABELS[:5].ravel().tolist()
    assert data.heldout.labels.tolist() == LABELS[5].tolist()
    assert (data.train.flips, data.heldout.flips) == (True, False)
    same = loaded("cifar10_unconditional", tmp_path)
    assert torch.equal(same.train.images, data.train.images)
    assert not same.train.labels.any()
    assert not same.heldout.labels.any()
    assert len(same.heldout.labels) == EACH


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("packed", [False, True])
def test_another_checksum_is_refused(packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = cifar10.FORMS[1]
    md5 = write(form, tmp_path, python, packed)
    changed = form.archive if packed else "data_batch_3"
    monkeypatch.setattr(cifar10, "MD5", {**md5, changed: "0" * 32})
    with pytest.raises(ConfigError, match=rf"{changed}: MD5 is {md5[changed]}, must be 0{{32}}: damaged"):
        loaded("cifar10", tmp_path)


def test_a_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set from the web must not be able to do what its maker likes, even where its checksum is right."""

    class Evil:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    content = pickle.dumps({"data": Evil(), "labels": []}, 2)
    monkeypatch.setattr(cifar10, "MD5", {"data_batch_1": hashlib.md5(content).hexdigest()})
    with pytest.raises(ConfigError, match=r"data_batch_1: not a batch of CIFAR-10 \(asks for posix.system\)"):
        cifar10.read_python(content, "data_batch_1")
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("small")
def test_cifar10_that_is_not_whole(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has none of cifar-10-batches-bin, .* `fewstep data fetch cifar10"):
        loaded("cifar10", tmp_path)
    write(cifar10.FORMS[0], tmp_path, binary, packed=False)
    place = tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin"
    whole = place.read_bytes()
    place.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match=rf"data_batch_2.bin: {len(whole) - 1} bytes are no whole number of images"):
        loaded("cifar10", tmp_path)
    place.write_bytes(whole[: -(1 + cifar10.PIXELS)])
    with pytest.raises(ConfigError, match=r"images of its classes: .*9.*, must be 10 of each of 10"):
        loaded("cifar10", tmp_path)
    place.unlink()
    with pytest.raises(ConfigError, match=r"has no data_batch_2.bin"):
        loaded("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.files.path=nowhere", "data.files.path=nowhere: must be a folder"),
        ("data.num_classes=100", "data.num_classes=100: must be 10, that of cifar10"),
        ("data.heldout=500", "data.heldout=500: must be 10000, that of cifar10"),
        ("data.files=null", "data.files=null: cifar10 needs it"),
        ("data.files.workers=-1", "data.files.workers=-1: must be 0 or more"),
    ],
)
def test_configs_that_cannot_be(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(DIGITS, ["preset=debug", "data=cifar10", f"data.files.path={tmp_path}", override])


def test_flips_are_refused_where_latents_are_kept(tmp_path: Path) -> None:
    # Broken: the config says that images are mirrored, the latents never are.
    autoencoder = ["+stage@stages.autoencoder=autoencoder", "space=latent"]
    with pytest.raises(ConfigError, match=r"data.files.flips=true: must be false with space=latent"):
        compose(DIGITS, ["preset=debug", "data=cifar10", f"data.files.path={tmp_path}", *autoencoder])


@pytest.mark.usefixtures("small")
def test_packed_jpegs_are_what_they_were_before_packing(tmp_path: Path) -> None:
    whole = []
    for number, image in enumerate(IMAGES.reshape(-1, 32, 32, 3)):
        buffer = io.BytesIO()
        Image.fromarray(np.uint8(image // 8 + 2 * number)).save(buffer, "JPEG", quality=75)
        whole.append(buffer.getvalue())
    length = whole[0].index(b"\xff\xda") + 2
    length += int.from_bytes(whole[0][length : length + 2], "big")
    for part, some, labels in (("train", whole[:100], LABELS[:5]), ("test", whole[100:], LABELS[5])):
        scans = [each[length:] for each in some]
        np.savez(
            tmp_path / f"cifar10_jpegq75_{part}.npz", head=np.frombuffer(some[0][:length], np.uint8),
            scan=np.frombuffer(b"".join(scans), np.uint8), y=labels.ravel(),
            offs=np.cumsum([0, *map(len, scans)]).astype(np.uint32),
        )  # fmt: skip
    data = loaded("cifar10_jpeg", tmp_path)
    for split, some in ((data.train, whole[:100]), (data.heldout, whole[100:])):
        expected = [np.asarray(Image.open(io.BytesIO(each)).convert("RGB")) for each in some]
        assert torch.equal(split.images, torch.tensor(np.stack(expected)).permute(0, 3, 1, 2))
    (tmp_path / "cifar10_jpegq75_test.npz").unlink()
    with pytest.raises(ConfigError, match=r"cifar10_jpegq75_test.npz: missing or damaged"):
        loaded("cifar10_jpeg", tmp_path)


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever gzip makes of them, content decides: mirrors pack the same files differently."""
    images = np.random.default_rng(2).integers(0, 256, (30, 28, 28))
    parts = {"train-images-idx3-ubyte": images[:20], "train-labels-idx1-ubyte": np.arange(20) % 10,
             "t10k-images-idx3-ubyte": images[20:], "t10k-labels-idx1-ubyte": np.arange(10)}  # fmt: skip
    monkeypatch.setattr(mnist, "SHA256", {k: hashlib.sha256(idx(v)).hexdigest() for k, v in parts.items()})
    monkeypatch.setitem(files.PUBLISHED, "mnist", replace(files.PUBLISHED["mnist"], heldout=EACH))
    for name, array in parts.items():
        folder = tmp_path if zipped else tmp_path / "MNIST" / "raw"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(idx(array), 1) if zipped else idx(array))
    data = loaded("mnist", tmp_path)
    assert torch.equal(data.train.images[:, 0], torch.tensor(images[:20], dtype=torch.uint8))
    assert torch.equal(data.heldout.images[:, 0], torch.tensor(images[20:], dtype=torch.uint8))
    assert data.train.labels.tolist() == [*range(10), *range(10)]
    assert data.heldout.labels.tolist() == list(range(10))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"t10k-labels.*(cannot be unpacked|must be)"):
        loaded("mnist", tmp_path)
    path.unlink()
    with pytest.raises(ConfigError, match=r"has no t10k-labels-idx1-ubyte; `fewstep data fetch mnist"):
        loaded("mnist", tmp_path)
