"""Downloads from a local server in a real one's place: whole with the right sum, or nothing."""

import hashlib
import http.server
import threading
import urllib.request
from pathlib import Path

import huggingface_hub
import pytest
from helpers import refused

from support import hub

CONTENT = bytes(range(256)) * 20


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def server():
    """(files, asked, url): `files` maps a path to (content, how much of it to send)."""
    files, asked = {"/a.npz": (CONTENT, None)}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path not in files:
                return self.send_error(404)
            content, sent = files[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:sent])

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    yield files, asked, f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def test_a_download_is_said_and_whole(server, tmp_path, capsys):
    _, asked, url = server
    path = tmp_path / "new" / "a.npz"
    hub.download(f"{url}/a.npz", path, md5(CONTENT))
    assert path.read_bytes() == CONTENT and asked == ["/a.npz"]
    assert list(path.parent.iterdir()) == [path]
    assert f"downloading {url}/a.npz to {path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "served, words",
    [
        ((CONTENT + b"!", None), (md5(CONTENT + b"!"), md5(CONTENT), "nothing was kept")),
        ((CONTENT, 500), ("500 of 5,120 bytes", "--data-dir")),
        ((CONTENT, 0), ("0 of 5,120", "--data-dir")),
        (None, ("404", "--data-dir")),
    ],
)
def test_a_wrong_or_broken_download_leaves_the_old_file_alone(server, tmp_path, served, words):
    files, _, url = server
    files["/a.npz"] = served
    if served is None:
        del files["/a.npz"]
    path = tmp_path / "a.npz"
    path.write_bytes(b"old")
    refused(lambda: hub.download(f"{url}/a.npz", path, md5(CONTENT)), f"{url}/a.npz", *words)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"old"


def test_an_interrupted_download_leaves_nothing(tmp_path, monkeypatch):
    class Answer:
        headers = {}

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def read(self, size):
            assert [path.suffix for path in tmp_path.iterdir()] == [".part"]  # being written
            raise KeyboardInterrupt

    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Answer())
    with pytest.raises(KeyboardInterrupt):
        hub.download("http://127.0.0.1:9/a.npz", tmp_path / "a.npz", md5(CONTENT))
    assert list(tmp_path.iterdir()) == []


def test_no_network_and_no_folder(tmp_path):
    url = "http://127.0.0.1:9/a.npz"  # nobody listens
    call = (url, tmp_path / "sets" / "a.npz", md5(CONTENT))
    refused(lambda: hub.download(*call), url, "refused", "--data-dir")
    (tmp_path / "sets").rmdir()
    (tmp_path / "sets").write_text("a file where the folder should be")
    refused(lambda: hub.download(*call), "sets", "--data-dir")


def test_the_md5_sum_is_computed_once_for_as_long_as_the_file_stays(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    path.write_bytes(CONTENT)
    calls, real = [], hashlib.md5
    monkeypatch.setattr(hashlib, "md5", lambda *args: calls.append(1) or real(*args))
    expected = real(CONTENT).hexdigest()
    assert hub.md5_of(path) == hub.md5_of(path) == expected and len(calls) == 1
    path.write_bytes(b"other")
    assert hub.md5_of(path) == real(b"other").hexdigest()


def test_where_downloads_stay(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDRL_CACHE", str(tmp_path))
    assert hub.cache_dir() == tmp_path
    monkeypatch.delenv("MEDRL_CACHE")
    assert hub.cache_dir() == Path.home() / ".cache" / "medrl"


def test_a_hub_name_has_at_most_one_slash():
    assert all(map(hub.is_path, ("./a", "/a/b", "~/a", "../a", "a/b/c")))
    assert not any(map(hub.is_path, ("a", "a/b", "Qwen/Qwen2.5-3B")))


# --------------------------------------------------------------------------------------- the hub
def test_online_is_an_answer_of_any_kind(server, monkeypatch):
    _, _, url = server
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)  # sends 404
    assert hub.online()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not hub.online()


def test_a_hub_file_that_cannot_be_had(monkeypatch):
    def download(repo, name, repo_type, local_files_only=False):
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")
        raise OSError("the disk is full")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "online", lambda: False)
    refused(lambda: hub.fetch("a/b", "c.zip"), "cannot be reached", "c.zip", "--data-dir")
    monkeypatch.setattr(hub, "online", lambda: True)
    refused(lambda: hub.fetch("a/b", "c.zip"), "cannot download c.zip", "a/b", "disk is full")
