"""Downloads, from a server of our own: checked, unpacked, refused."""

import functools
import http.server
import io
import tarfile
import threading
from hashlib import sha256

import pytest

from shared import data
from shared.data import load
from shared.errors import DataError
from tests.shared.official_files import SOURCE, cifar_records, needs_source, write_mnist

pytestmark = pytest.mark.usefixtures("no_data_but_the_tests_own")

# ------------------------------------------------------------------------------------------------ download


@pytest.fixture
def server(tmp_path):
    """A web server on this machine: (its folder, its address)."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as service:
        thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield folder, f"http://127.0.0.1:{service.server_port}"
        service.shutdown()
        thread.join()


def serve(monkeypatch, server, name, files):
    folder, address = server
    for file, content in files.items():
        (folder / file).write_bytes(content)
    table = {f"{address}/{file}": sha256(content).hexdigest() for file, content in files.items()}
    monkeypatch.setitem(data.DOWNLOADS, name, table)
    return table


def tar(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_an_archive_is_downloaded_unpacked_and_read(monkeypatch, server, tmp_path):
    archive = tar({"cifar-10-batches-bin/test_batch.bin": cifar_records([1, 2]).tobytes()})
    serve(monkeypatch, server, "cifar10", {"cifar-10-binary.tar.gz": archive})
    root = tmp_path / "new" / "root"
    assert load("cifar10", "test", root=root, download=True).labels.tolist() == [1, 2]
    assert [p.name for p in root.iterdir()] == ["cifar-10-batches-bin"]  # neither the archive nor a temporary folder
    (server[0] / "cifar-10-binary.tar.gz").unlink()
    assert len(load("cifar10", "test", root=root, download=True)) == 2  # what is there is not fetched again


def test_single_files_are_downloaded_and_read(monkeypatch, server, tmp_path):
    write_mnist(server[0])
    serve(monkeypatch, server, "mnist", {p.name: p.read_bytes() for p in server[0].iterdir()})
    assert len(load("mnist", "train", root=tmp_path / "new", download=True)) == 4
    assert len(list((tmp_path / "new/MNIST/raw").iterdir())) == 2


def test_a_file_that_is_there_is_not_replaced_by_a_download(monkeypatch, server, tmp_path):
    own = cifar_records([3]).tobytes()
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for number in range(1, 6):
        (folder / f"data_batch_{number}.bin").write_bytes(own)
    members = {f"cifar-10-batches-bin/{name}.bin": cifar_records([1, 2]).tobytes()
               for name in ("test_batch", *(f"data_batch_{number}" for number in range(1, 6)))}  # fmt: skip
    serve(monkeypatch, server, "cifar10", {"cifar-10-binary.tar.gz": tar(members)})
    assert load("cifar10", "test", root=tmp_path, download=True).labels.tolist() == [1, 2]
    assert load("cifar10", "train", root=tmp_path, download=True).labels.tolist() == [3] * 5


def test_without_the_option_nothing_is_downloaded(monkeypatch, server, tmp_path):
    serve(monkeypatch, server, "cifar10", {"a.tar.gz": tar({"cifar-10-batches-bin/test_batch.bin": b""})})
    with pytest.raises(DataError, match=r"data\.download=true"):
        load("cifar10", "test", root=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_changed_download_is_refused_and_leaves_nothing(monkeypatch, server, tmp_path):
    serve(monkeypatch, server, "mnist", {"train-images-idx3-ubyte.gz": b"as published"})
    (server[0] / "train-images-idx3-ubyte.gz").write_bytes(b"as published, cut")
    with pytest.raises(DataError, match=r"sha256 .* expected"):
        load("mnist", "train", root=tmp_path / "new", download=True)
    assert [p for p in (tmp_path / "new").rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/x.tar.gz", "http://no-such-host.invalid/x.tar.gz"])
def test_a_network_failure_is_one_line_that_names_the_address(monkeypatch, tmp_path, address):
    monkeypatch.setitem(data.DOWNLOADS, "cifar10", {address: "0" * 64})
    with pytest.raises(DataError, match="the download failed") as caught:
        load("cifar10", "test", root=tmp_path / "new", download=True)
    assert str(caught.value).startswith(address)
    assert "\n" not in str(caught.value)


def test_a_missing_page_is_a_failed_download(monkeypatch, server, tmp_path):
    monkeypatch.setitem(data.DOWNLOADS, "cifar10", {f"{server[1]}/gone.tar.gz": "0" * 64})
    with pytest.raises(DataError, match="404"):
        load("cifar10", "test", root=tmp_path / "new", download=True)


def test_an_archive_cannot_write_outside_its_folder(monkeypatch, server, tmp_path):
    archive = tar({"cifar-10-batches-bin/test_batch.bin": b"", "../../escaped": b"!"})
    serve(monkeypatch, server, "cifar10", {"x.tar.gz": archive})
    with pytest.raises(DataError, match="outside the destination"):
        load("cifar10", "test", root=tmp_path / "new", download=True)
    assert not list(tmp_path.rglob("escaped"))


def test_a_root_that_cannot_be_written_is_a_data_error(monkeypatch, server, tmp_path):
    serve(monkeypatch, server, "cifar10", {"x.tar.gz": tar({})})
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match="cannot be filled"):
        load("cifar10", "test", root=tmp_path / "file", download=True)


@needs_source
def test_the_digests_of_the_mnist_downloads_are_those_of_the_official_files():
    for url, digest in data.DOWNLOADS["mnist"].items():
        assert sha256((SOURCE / "mnist" / url.rpartition("/")[2]).read_bytes()).hexdigest() == digest
