"""Models on the Hugging Face hub: listing files, reading headers by byte range, fetching shard by shard, uploading.

Only public names of huggingface_hub are used. It applies the user's token, cache, endpoint and offline settings itself.
"""

import errno
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from qcli.checkpoint.local_files import LocalFiles
from qcli.errors import CheckpointError, HubError

_TRIES = 4
_WITHOUT_RANGES = 128 << 20  # bytes read at most where a server ignores ranges: enough for any header
_PART, _GAP, _CONNECTIONS = 4 << 20, 1 << 16, 8  # bytes of a request for parts; that are not worth one; requests at a time
_BACK_OFF = 1.0  # seconds before the second try; doubles
_CONFIGS = ("config.json", "adapter_config.json")  # one of them says what a repository holds


def open_repository(repo: str, revision: str | None, *, stream: bool):
    """The files of a hub repository at one commit. Offline: the snapshot in the user's cache. Raises HubError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        with translated(repo, revision):
            info = retried(lambda: HfApi().model_info(repo, revision=revision, files_metadata=True))
    except HubError as e:
        cause = e.__cause__
        if isinstance(cause, OfflineModeIsEnabled) or _is_connection_loss(cause):
            cached = _cached_snapshot(repo, revision)
            if cached is not None:
                return LocalFiles(cached, repo.rpartition("/")[2], revision=cached.name)
        raise
    return _Repository(repo, revision or "main", info, stream)


def _cached_snapshot(repo: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        return None
    whole = any((folder / name).exists() for name in _CONFIGS)
    return folder if whole else None


class _Repository:
    """A repository at one commit. Small files are fetched through the user's cache, weight files when they are opened."""

    is_hub = True

    def __init__(self, repo: str, asked: str, info, stream: bool):
        self.repo, self.asked, self.stream = repo, asked, stream
        self.name, self.revision = repo.rpartition("/")[2], info.sha
        self._files = {s.rfilename: s for s in info.siblings or []}
        self.names = sorted(self._files)
        self._folder: Path | None = None
        self._in_parts = False
        self._here: dict[str, set[tuple[int, int]]] = {}  # the parts that were fetched, by file

    def size(self, name: str) -> int:
        return self._files[name].size

    def hash(self, name: str) -> str | None:
        file = self._files[name]
        return file.lfs.sha256 if file.lfs else file.blob_id

    def local(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        with translated(self.repo, self.revision):
            if name in _CONFIGS:  # by the user's own revision name: the cache then finds it offline
                retried(lambda: hf_hub_download(self.repo, name, revision=self.asked))
            return Path(retried(lambda: hf_hub_download(self.repo, name, revision=self.revision)))

    def _cached(self, name: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.repo, name, revision=self.revision)
        return Path(path) if isinstance(path, str) else None

    def read(self, name: str, offset: int, count: int) -> bytes:
        cached = self._cached(name)
        if cached is not None:
            with open(cached, "rb") as file:
                file.seek(offset)
                return file.read(count)
        with translated(self.repo, self.revision):
            return retried(lambda: self._ranged(name, offset, count))

    def _ranged(self, name: str, offset: int, count: int) -> bytes:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        url = hf_hub_url(self.repo, name, revision=self.revision)
        headers = build_hf_headers() | {"Range": f"bytes={offset}-{offset + count - 1}"}
        with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
            hf_raise_for_status(response)
            whole = response.status_code == 200  # a server may ignore the range
            skip = offset if whole else 0
            if skip and skip + count > _WITHOUT_RANGES:
                raise HubError(
                    f"the hub sends the whole of {self.repo}/{name}, expected only bytes {offset:,} to {offset + count:,}",
                    f"Fetch the model first, then give its folder: hf download {self.repo} --local-dir FOLDER",
                )
            data = bytearray()
            for piece in response.iter_bytes():
                data += piece
                if whole and len(data) >= skip + count:  # a ranged answer is read to its end: the connection is then reused
                    break
        return bytes(data[skip : skip + count])

    def weights(self, name: str) -> Path:
        cached = self._cached(name)
        if cached is not None:
            return cached
        if not self.stream or self._folder is None:
            return self.local(name)
        from huggingface_hub import hf_hub_download

        with translated(self.repo, self.revision):
            path = retried(lambda: hf_hub_download(self.repo, name, revision=self.revision, local_dir=self._folder))
        return Path(path)

    def parts(self, name: str, parts: Sequence[tuple[int, int]]) -> Path:
        """A file with at least these bytes (start, end) of `name` at their places. It is the whole file unless `download_to` asked
        for parts, and where the user's cache has it."""
        if not self._in_parts or self._folder is None or self._cached(name) is not None:
            return self.weights(name)
        path, here = self._folder / name, self._here.setdefault(name, set())
        path.parent.mkdir(parents=True, exist_ok=True)
        missing = [(at, min(at + _PART, end)) for start, end in joined(set(parts) - here) for at in range(start, end, _PART)]
        with translated(self.repo, self.revision), ThreadPoolExecutor(_CONNECTIONS) as pool:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                os.ftruncate(fd, self.size(name))
                list(pool.map(lambda part: os.pwrite(fd, self.read(name, part[0], part[1] - part[0]), part[0]), missing))
            finally:
                os.close(fd)
        here.update(parts)
        return path

    def read_ahead(self, names: list[str]) -> None:
        """Does nothing: what is fetched is in the system's cache already."""

    def release(self, name: str) -> None:
        self._here.pop(name, None)
        if self._folder is not None:
            (self._folder / name).unlink(missing_ok=True)

    def download_to(self, folder: Path, parts: bool = False) -> None:
        """Sets the folder for files that are deleted once they are read: with `parts`, for the parts of files."""
        self._in_parts = parts
        self._folder = folder if self.stream or parts else None

    def download_bytes(self, volume: Path, names: list[str]) -> int:
        sizes = [self.size(n) for n in names if self._cached(n) is None]
        if self.stream:
            return max(sizes, default=0)
        from huggingface_hub.constants import HF_HUB_CACHE

        cache = next(p for p in [Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).parents] if p.exists())
        return sum(sizes) if os.stat(cache).st_dev == os.stat(volume).st_dev else 0


def joined(parts: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges (start, end) in order, those that touch or nearly touch as one."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(parts):
        if found and start <= found[-1][1] + _GAP:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def _is_connection_loss(error: BaseException | None) -> bool:
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in (429, 500, 502, 503, 504)
    return isinstance(error, (HTTPError, ConnectionError, TimeoutError))


def retried(call):
    from huggingface_hub.errors import HfHubHTTPError

    wait = _BACK_OFF
    for left in range(_TRIES - 1, -1, -1):
        try:
            return call()
        except Exception as e:  # only a lost connection is retried
            answered = isinstance(e, HfHubHTTPError) and e.response is not None
            lost = e if answered or not e.__cause__ or _is_connection_loss(e) else e.__cause__
            if not left or not _is_connection_loss(lost):
                raise
            time.sleep(wait)
            wait *= 2


@contextmanager
def translated(repo: str, revision: str | None) -> Iterator[None]:
    """Turns huggingface_hub's exceptions into a HubError: one sentence, and what to do."""
    from huggingface_hub import errors

    at = f" at revision {revision}" if revision else ""
    rerun = "Check the connection and run the same command again: finished work and downloads are kept."
    try:
        yield
    except errors.GatedRepoError as e:
        raise HubError(
            f"{repo} is gated: the hub gives it only to users who accepted its terms",
            f"Accept them at the model's page, then log in: hf auth login (model {repo}).",
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise HubError(
            f"the hub knows no model {repo}, or it is private",
            "Check the spelling; for a private model log in: hf auth login. A local folder is given by its path.",
        ) from e
    except errors.RevisionNotFoundError as e:
        raise HubError(f"{repo} has no revision {revision}", "Give a branch, a tag or a commit of it.") from e
    except errors.EntryNotFoundError as e:
        raise HubError(f"{repo}{at} lacks a file that it lists: {_line(e)}", "Try again later.") from e
    except errors.OfflineModeIsEnabled as e:
        raise HubError(
            f"{repo} is not in the cache, and HF_HUB_OFFLINE forbids fetching it", "Unset HF_HUB_OFFLINE, or fetch it first."
        ) from e
    except errors.LocalTokenNotFoundError as e:
        raise HubError(f"there is no hub token, and writing to {repo} needs one", "Log in first: hf auth login.") from e
    except errors.HfHubHTTPError as e:
        status = e.response.status_code if e.response is not None else "?"
        hint = "Log in with a token that may do this: hf auth login." if status in (401, 403) else rerun
        raise HubError(f"the hub answered {status} for {repo}: {_line(e)}", hint) from e
    except errors.HFValidationError as e:
        raise HubError(f"{repo} is not a valid hub id: {_line(e)}", "Write it as org/name.") from e
    except (errors.HTTPError, ConnectionError, TimeoutError, errors.FileMetadataError) as e:
        here = "" if "/" in repo else f"; there is no folder {repo} here either"
        raise HubError(f"the connection to the hub was lost while reading {repo} ({_line(e)}){here}", rerun) from e
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(Path.home()).free
            raise CheckpointError(
                f"the disk is full while fetching {repo} ({free:,} bytes are free)", "Free some space and rerun, or use --stream."
            ) from e
        raise HubError(f"fetching {repo} failed: {_line(e)}", rerun) from e


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
