"""What is on this machine and what can be had from the network: hub files, checked downloads."""

import functools
import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

import huggingface_hub
from tqdm import tqdm

from support.errors import UsageError


def is_path(name: str) -> bool:
    """Whether a model's name can only be a folder: a hub name has at most one slash."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def cached(repo: str, name: str, kind: str) -> bool:
    """Whether a file of a hub "model" or "dataset" is on this machine already."""
    found = huggingface_hub.try_to_load_from_cache(repo, name, repo_type=kind)
    return isinstance(found, str)


def online() -> bool:
    """Whether the hub answers within four seconds; its own client would retry for half a minute."""
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=4).close()
    except urllib.error.HTTPError:
        return True  # an answer, if no welcome
    except OSError:
        return False
    return True


def fetch(repo: str, name: str) -> str:
    """Path of one file of a hub data set: from the cache, else downloaded with a progress bar."""
    download_it = functools.partial(
        huggingface_hub.hf_hub_download, repo, name, repo_type="dataset"
    )
    try:
        return download_it(local_files_only=True)
    except huggingface_hub.errors.LocalEntryNotFoundError:
        pass
    if not online():
        raise UsageError(
            f"the hub cannot be reached and {name} of its data set {repo} is not in the cache: "
            "connect to the network, or give --data-dir DIR with the unpacked archive"
        )
    try:
        return download_it()
    except (OSError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise UsageError(f"cannot download {name} of the hub data set {repo}: {error}") from None


# ----------------------------------------------------------------- files with a published sum
def cache_dir() -> Path:
    """Where downloads stay; the environment variable MEDRL_CACHE moves it."""
    return Path(os.environ.get("MEDRL_CACHE") or Path.home() / ".cache" / "medrl")


def md5_of(path: Path) -> str:
    """The MD5 sum of a file; computed once for as long as the file is not changed."""
    return _md5_of(path, path.stat().st_mtime_ns)


@functools.cache
def _md5_of(path: Path, changed: int) -> str:
    digest = hashlib.md5()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def download(url: str, path: Path, md5: str) -> None:
    """Fetch a file of known MD5 sum.

    It is written beside its place and moved there only when it is whole and its sum is right, so
    a broken download leaves nothing behind.
    """
    print(f"downloading {url} to {path}", file=sys.stderr)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # two runs may fetch at the same time
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = _receive(url, part, path.name)
        if found != md5:
            raise UsageError(
                f"{url}: the MD5 sum is {found} and should be {md5}: nothing was kept; "
                "try again later"
            )
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:
        raise UsageError(
            f"cannot download {url} to {path} ({error}): "
            f"try again, or give --data-dir DIR with {path.name} in it"
        ) from None
    finally:
        # Ctrl-C comes through here too.
        if part.is_file():
            part.unlink()


def _receive(url: str, part: Path, name: str) -> str:
    """Write what a URL sends to `part` -> its MD5 sum. Raises OSError where it ends too early."""
    digest = hashlib.md5()
    with urllib.request.urlopen(url, timeout=10) as answer, part.open("wb") as file:
        size = int(answer.headers.get("Content-Length") or 0)
        bar = tqdm(total=size or None, unit="B", unit_scale=True, desc=name, disable=None)
        with bar:
            while chunk := answer.read(1 << 20):
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
        if file.tell() < size:
            raise OSError(f"the connection ended after {file.tell():,} of {size:,} bytes")
    return digest.hexdigest()
