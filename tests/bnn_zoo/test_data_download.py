"""Downloads, against a server on this machine: good, damaged, interrupted, absent, and not a second time."""

import gzip
import hashlib
import io
import socket
import tarfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from bnn_zoo import data
from bnn_zoo.data import registry
from bnn_zoo.data.convert import (
    arrays_digest,
    from_cifar_binary,
    from_idx,
    from_idx_balanced,
    from_uci_text,
    read_idx,
)
from bnn_zoo.data.entries import DataFile, Source
from bnn_zoo.data.store import checked_arrays, fetch_file, read_arrays


class Server:
    """Serves `files` by path; `cut` breaks the connection half way; counts requests."""

    def __init__(self):
        self.files, self.requests, self.cut = {}, [], False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.path)
                content = outer.files.get(self.path)
                if content is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if outer.cut else content)

            def log_message(self, format, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server():
    running = Server()
    yield running
    running.close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("BNN_ZOO_DATA", str(folder))
    return folder


@pytest.fixture
def tiny(monkeypatch):
    """A registered table of 20 rows that is not bundled, and the bytes of its file."""
    rng = np.random.default_rng(0)
    order = rng.permutation(20).astype(np.int32)
    arrays = {"X": rng.normal(size=(20, 6)), "y": rng.normal(size=20)}
    arrays |= {"train_idx": order[None, :18], "test_idx": order[None, 18:]}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    content = buffer.getvalue()
    file = DataFile(
        path="uci/tiny.npz", sha256=hashlib.sha256(content).hexdigest(), arrays_sha256=arrays_digest(arrays)
    )
    entry = replace(registry.ENTRIES["yacht"], name="tiny", file=file, num_data=20, splits=1)
    monkeypatch.setitem(registry.ENTRIES, "tiny", entry)
    return content


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_good_download_is_kept_and_loads(server, cache, tiny):
    server.files["/uci/tiny.npz"] = tiny
    path = data.fetch("tiny", base_url=server.url)
    assert path == cache / "uci" / "tiny.npz"
    assert path.read_bytes() == tiny
    assert data.load("tiny").x_train.shape == (18, 6)
    assert files_in(cache) == ["tiny.npz"]


def test_a_second_call_does_not_download_again(server, cache, tiny):
    server.files["/uci/tiny.npz"] = tiny
    data.fetch("tiny", base_url=server.url)
    data.fetch("tiny", base_url=server.url + "/")
    assert server.requests == ["/uci/tiny.npz"]
    where = {info.name: info.where for info in data.available()}
    assert where["tiny"] == "cache"


def test_a_checksum_mismatch_names_both_sums_and_keeps_nothing(server, cache, tiny):
    damaged = bytearray(tiny)
    damaged[len(tiny) // 2] ^= 1
    server.files["/uci/tiny.npz"] = bytes(damaged)
    found, expected = (hashlib.sha256(content).hexdigest() for content in (damaged, tiny))
    with pytest.raises(data.ChecksumError, match=rf"uci/tiny\.npz.*sha256 {found}, expected {expected}.*nothing was"):
        data.fetch("tiny", base_url=server.url)
    assert files_in(cache) == []


def test_a_different_but_readable_file_is_refused(server, cache, tiny):
    buffer = io.BytesIO()
    np.savez(buffer, X=np.zeros(3))
    server.files["/uci/tiny.npz"] = buffer.getvalue()
    with pytest.raises(data.ChecksumError, match="not the registered file"):
        data.fetch("tiny", base_url=server.url)
    assert files_in(cache) == []


def test_an_interrupted_download_leaves_nothing_and_can_be_repeated(server, cache, tiny):
    server.files["/uci/tiny.npz"] = tiny
    server.cut = True
    with pytest.raises(data.DownloadError, match=r"could not download uci/tiny\.npz"):
        data.fetch("tiny", base_url=server.url)
    assert files_in(cache) == []
    server.cut = False
    assert data.fetch("tiny", base_url=server.url).read_bytes() == tiny


def test_a_server_that_is_down_says_where_to_put_the_file(cache, tiny):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with pytest.raises(data.DownloadError, match=r"put the file with sha256 \w{64} at .*tiny\.npz.*BNN_ZOO_DATA"):
        data.fetch("tiny", base_url=f"http://127.0.0.1:{port}")
    assert files_in(cache) == []


def test_a_file_that_the_server_lacks_is_a_download_error(server, cache, tiny):
    with pytest.raises(data.DownloadError, match="404"):
        data.fetch("tiny", base_url=server.url)


def test_a_damaged_file_in_the_cache_is_refused_by_load_and_replaced_by_fetch(server, cache, tiny):
    path = cache / "uci" / "tiny.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes(tiny[:100])
    with pytest.raises(data.ChecksumError, match=r"tiny\.npz is damaged or another version .*bnn-zoo data get"):
        data.load("tiny")
    assert path.exists()
    server.files["/uci/tiny.npz"] = tiny
    data.fetch("tiny", base_url=server.url)
    assert path.read_bytes() == tiny


def test_a_failed_replacement_leaves_the_old_file(server, cache, tiny):
    path = cache / "uci" / "tiny.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"old")
    server.files["/uci/tiny.npz"] = tiny
    server.cut = True
    with pytest.raises(data.DownloadError):
        data.fetch("tiny", base_url=server.url)
    assert path.read_bytes() == b"old"


def test_a_cache_that_cannot_be_written_is_named(server, tmp_path, monkeypatch, tiny):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    monkeypatch.setenv("BNN_ZOO_DATA", str(blocked))
    server.files["/uci/tiny.npz"] = tiny
    with pytest.raises(data.DownloadError, match="Set BNN_ZOO_DATA to a directory that can be written"):
        data.fetch("tiny", base_url=server.url)


def test_a_file_without_a_public_source_says_what_to_put_where(cache, tiny):
    with pytest.raises(data.DownloadError, match=r"no public source is known for uci/tiny\.npz; put the file"):
        data.load("tiny")


def test_sets_that_need_no_file_are_not_fetched(cache):
    assert data.fetch("energy") is None
    assert data.fetch("gap") is None
    assert not cache.exists()


def test_the_cache_directory_is_the_users_own_unless_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("BNN_ZOO_DATA", str(tmp_path))
    assert data.cache_dir() == tmp_path
    monkeypatch.delenv("BNN_ZOO_DATA")
    assert data.cache_dir().name == "bnn-zoo"


def test_a_progress_bar_can_be_shown(server, cache, tiny, capsys):
    server.files["/uci/tiny.npz"] = tiny
    data.fetch("tiny", base_url=server.url, progress=True)
    assert "uci/tiny.npz" in capsys.readouterr().err


def public_files(arrays):
    """The arrays of a table as the text files of the public repository; the target before the features."""
    num_features = arrays["X"].shape[1]
    tables = {
        "data.txt": np.column_stack([arrays["y"], arrays["X"]]),
        "index_features.txt": np.arange(1, num_features + 1),
        "index_target.txt": np.array([0]),
    }
    for part in ("train", "test"):
        for split, rows in enumerate(arrays[f"{part}_idx"]):
            tables[f"index_{part}_{split}.txt"] = rows
    contents = {}
    for name, table in tables.items():
        buffer = io.StringIO()
        np.savetxt(buffer, table, fmt="%.17g" if name == "data.txt" else "%.18e")
        contents[name] = buffer.getvalue().encode()
    return contents


def test_the_public_text_files_convert_to_exactly_the_registered_arrays(server, cache, monkeypatch):
    bundled = registry.ENTRIES["yacht"]
    contents = public_files(read_arrays(bundled.file))
    assert set(contents) == set(bundled.file.source.urls)
    server.files = {f"/{name}": content for name, content in contents.items()}
    source = Source(urls={name: f"{server.url}/{name}" for name in contents}, convert=from_uci_text)
    reference = data.load("yacht", split=7)
    monkeypatch.setitem(
        registry.ENTRIES, "yacht", replace(bundled, file=replace(bundled.file, bundled=False, source=source))
    )
    converted = data.load("yacht", split=7)
    assert len(server.requests) == 43
    assert torch.equal(converted.x_train, reference.x_train)
    assert torch.equal(converted.y_test, reference.y_test)
    data.load("yacht", split=8)
    assert len(server.requests) == 43
    assert files_in(cache) == ["yacht.npz"]


@pytest.mark.parametrize("change", [lambda text: text.replace(b"e", b"?"), lambda text: text[: len(text) // 2]])
def test_a_changed_public_source_is_noticed(server, cache, change):
    file = registry.ENTRIES["yacht"].file
    contents = public_files(read_arrays(file))
    contents["index_test_3.txt"] = change(contents["index_test_3.txt"])
    server.files = {f"/{name}": content for name, content in contents.items()}
    source = Source(urls={name: f"{server.url}/{name}" for name in contents}, convert=from_uci_text)
    with pytest.raises(data.ChecksumError, match="nothing was kept"):
        fetch_file(replace(file, source=source))
    assert files_in(cache) == []


def write_idx(path, array):
    header = b"\x00\x00\x08" + bytes([array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))
    return path


def test_idx_files_convert_to_image_arrays(tmp_path):
    rng = np.random.default_rng(0)
    raw = {
        "train-images": rng.integers(0, 256, (7, 28, 28), dtype=np.uint8),
        "train-labels": rng.integers(0, 10, 7, dtype=np.uint8),
        "t10k-images": rng.integers(0, 256, (3, 28, 28), dtype=np.uint8),
        "t10k-labels": rng.integers(0, 10, 3, dtype=np.uint8),
    }
    arrays = from_idx({name: write_idx(tmp_path / name, array) for name, array in raw.items()})
    for name, key in [("train-images", "x_train"), ("train-labels", "y_train"), ("t10k-images", "x_test")]:
        np.testing.assert_array_equal(arrays[key], raw[name])
    (tmp_path / "wrong").write_bytes(gzip.compress(b"hello"))
    with pytest.raises(data.DataError, match="expected an idx file of bytes in wrong"):
        read_idx(tmp_path / "wrong")


def test_the_first_500_of_each_class_are_taken_in_file_order(tmp_path):
    labels = np.random.default_rng(0).permutation(np.arange(2000) % 3).astype(np.uint8)
    images = np.arange(2000, dtype=np.uint32).view(np.uint8).reshape(2000, 2, 2)
    files = {"t10k-images": write_idx(tmp_path / "i", images), "t10k-labels": write_idx(tmp_path / "l", labels)}
    arrays = from_idx_balanced(files)
    taken = arrays["x"].reshape(1500, 4).copy().view(np.uint32)[:, 0]
    assert (np.diff(taken.astype(int)) > 0).all()
    for label in range(3):
        assert taken[arrays["y"] == label].tolist() == np.flatnonzero(labels == label)[:500].tolist()


def test_the_cifar_archive_converts_to_channels_first_images(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    labels = np.array([3, 8, 8, 0], dtype=np.uint8)
    rows = np.concatenate([labels[:, None], images.reshape(4, -1)], axis=1).tobytes()
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        member.size = len(rows)
        archive.addfile(member, io.BytesIO(rows))
    arrays = from_cifar_binary({"archive": tmp_path / "c.tar.gz"})
    np.testing.assert_array_equal(arrays["x"], images)
    np.testing.assert_array_equal(arrays["y"], labels)


def test_the_array_checksum_ignores_compression_and_order_but_not_values(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.arange(3)}
    file = DataFile(path="x.npz", sha256="0" * 64, arrays_sha256=arrays_digest(arrays))
    np.savez(tmp_path / "plain.npz", b=arrays["b"], a=arrays["a"])
    np.savez_compressed(tmp_path / "packed.npz", **arrays)
    for name in ("plain.npz", "packed.npz"):
        np.testing.assert_array_equal(checked_arrays(tmp_path / name, file)["a"], arrays["a"])
    for changed in ({**arrays, "b": np.array([0, 1, 3])}, {**arrays, "a": arrays["a"].T}, {"a": arrays["a"]}):
        assert arrays_digest(changed) != file.arrays_sha256
    assert arrays_digest({**arrays, "b": arrays["b"].astype(np.int32)}) != file.arrays_sha256


@pytest.mark.parametrize("name", [n for n, e in registry.ENTRIES.items() if e.file is not None])
def test_every_registered_source_is_a_public_https_address(name):
    source = registry.ENTRIES[name].file.source
    assert source.urls
    assert all(url.startswith("https://") for url in source.urls.values())
