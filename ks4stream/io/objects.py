"""One interface to files and to objects in stores that are reached over HTTP.

A *location* is a string: the absolute path of a file or folder, or a URL (``s3://``, ``gs://``, ``az://``,
``https://``, ``http://``). Only locations travel to workers: each process opens stores itself, with the credentials in
its own environment, and a location never contains a secret. Requests that fail temporarily are retried, with pauses
that grow and are partly random; a permanent failure becomes a :class:`~ks4stream.errors.RecordingError`.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import numpy as np

from ks4stream.errors import MissingDependencyError, RecordingError, ResultsError

SCHEMES = ("s3", "gs", "az", "https", "http")

CONNECTION = {"connect_timeout": "5s", "read_timeout": "20s", "timeout": "15min", "allow_http": True}
BACKOFF = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=15), "base": 2}
HASTY = {"max_retries": 4, "retry_timeout": timedelta(seconds=15), "backoff": BACKOFF}  # to report mistakes soon
PATIENT = {"max_retries": 10, "retry_timeout": timedelta(minutes=5), "backoff": BACKOFF}  # hours of work are at stake
MAX_METADATA_BYTES = 1 << 25  # no file that describes a recording or a probe is larger
_COPIED_BYTES = 5 << 30  # what a store copies in one request, at most (the limit of S3)
_ADVICE = {
    "s3": "Check the bucket, AWS_REGION, and AWS_ENDPOINT_URL if the store is not Amazon's",
    "gs": "Check the bucket; a public one needs GOOGLE_SKIP_SIGNATURE=true",
    "az": "Check the container and AZURE_STORAGE_ACCOUNT_NAME; a public one needs AZURE_SKIP_SIGNATURE=true",
}
_CREDENTIALS = {
    "s3": "Check AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws; for public data, set "
    "AWS_SKIP_SIGNATURE=true",
    "gs": "Check GOOGLE_APPLICATION_CREDENTIALS; for public data, set GOOGLE_SKIP_SIGNATURE=true",
    "az": "Check AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY; for public data, set "
    "AZURE_SKIP_SIGNATURE=true",
}
# Texts of obstore's generic errors where listing is refused, no credentials were found, or a key is not valid.
_REFUSALS = re.compile("status code: 40[13]|token request|Invalid Access Key")


@dataclass(frozen=True)
class Status:
    """What is known about a file or an object without reading it.

    Attributes
    ----------
    size_bytes : int
    tag : str
        Changes when the content does: modification time of a file, ETag of an object.
    """

    size_bytes: int
    tag: str


Version = dict[str, str]
"""How a store identifies the successive contents of an object: by ETags or generations."""


class Versioned(NamedTuple):
    """The content of an object, and which version of the object it is."""

    content: bytes
    version: Version


def locate(path: str | os.PathLike[str]) -> str:
    """Return a location that means the same in every process: an absolute path, or a URL as it was given.

    Raises
    ------
    RecordingError
        If a URL has an unknown scheme, or contains a user, a password or a query: these may be secrets, and
        locations are shown in logs and sent to workers.
    """
    text = os.fspath(path)
    scheme, mark, rest = text.partition("://")
    if not mark:
        return os.path.abspath(os.path.expanduser(text))
    if scheme == "file":
        return os.path.abspath(url2pathname(urlsplit(text).path))
    if scheme not in SCHEMES:
        known = ", ".join(f"{one}://" for one in (*SCHEMES, "file"))
        raise RecordingError(f"Recordings cannot be read from {scheme}://. Give a path, or one of {known}.")
    host, _, key = rest.partition("/")
    if "@" in host or (scheme in ("https", "http") and "?" in key):
        raise RecordingError(
            f"The {scheme}:// address contains a user, a password or a query (after '?'), which would be shown in logs "
            "and sent to workers. Leave them out, and set credentials in the environment (for s3://, gs://, az://)."
        )
    if not host or "//" in rest.rstrip("/"):
        raise RecordingError(
            f"{text} is not the address of an object: expected {scheme}://BUCKET/KEY, with single slashes."
        )
    return text.rstrip("/")


def is_remote(location: str) -> bool:
    """Whether a location is a URL."""
    return "://" in location


def name_of(location: str) -> str:
    """Return the last part of a location, for messages and for names derived from it."""
    name = PurePosixPath(location).name if is_remote(location) else os.path.basename(location)
    return unquote(name) if location.startswith("http") else name


def child(location: str, name: str) -> str:
    """Return a location below another one; `name` may have several parts."""
    return f"{location}/{name}" if is_remote(location) else os.path.join(location, name)


def status(location: str) -> Status | None:
    """Return the size and the tag of a file or an object.

    Returns
    -------
    Status or None
        None if it does not exist.

    Raises
    ------
    RecordingError
        If the store refuses the request or cannot be reached.
    """
    if not is_remote(location):
        try:
            found = os.stat(location)
        except (OSError, ValueError):
            return None
        return _status_of_file(found) if stat.S_ISREG(found.st_mode) else None
    store, key = _parent_store(location, False)
    import obstore

    try:
        with translate_errors(location):
            meta = obstore.head(store, key)
    except _MissingError:
        return None
    return _status_of(meta)


def read_bytes(location: str, start: int, stop: int) -> memoryview:
    """Read bytes `start` to `stop` of a file or an object.

    Returns
    -------
    memoryview
        Shorter than requested if the file or object ends before `stop`. Arrays made from it are writable.

    Raises
    ------
    RecordingError
        If it cannot be read.
    """
    if not is_remote(location):
        try:
            with open(location, "rb") as file:
                file.seek(start)
                content = np.empty(max(stop - start, 0), np.uint8).data  # a bytearray would be zeroed first
                return content[: file.readinto(content)]
        except OSError as error:
            raise RecordingError(f"{location} cannot be read: {error}.") from error
    if stop <= start:
        return memoryview(b"")
    store, key = _parent_store(location, True)
    import obstore

    with translate_errors(location):
        return memoryview(bytearray(obstore.get_range(store, key, start=start, end=stop)))


def read_metadata(location: str, size_bytes: int) -> bytes:
    """Read a whole file or object that describes a recording or a probe.

    Raises
    ------
    RecordingError
        If it cannot be read, or is larger than any such description.
    """
    if size_bytes > MAX_METADATA_BYTES:
        raise RecordingError(
            f"{location} has {size_bytes} bytes; a file that describes a recording or a probe may have at most "
            f"{MAX_METADATA_BYTES}. Check that it is the right file."
        )
    return bytes(read_bytes(location, 0, size_bytes))


def read_versioned(location: str) -> Versioned | None:
    """Read a small object and its version; None if it does not exist.

    Raises
    ------
    RecordingError
        If it cannot be read.
    """
    store, key = _parent_store(location, True)
    import obstore

    try:
        with translate_errors(location):
            found = obstore.get(store, key)
            return Versioned(bytes(found.bytes()), _version_of(found.meta))
    except _MissingError:
        return None


def write_bytes(location: str, content: bytes) -> None:
    """Write an object, all at once.

    Raises
    ------
    ResultsError
        If the store refuses it.
    """
    store, key = _parent_store(location, True)
    import obstore

    with translate_errors(location, writing=True):
        obstore.put(store, key, content)


def write_if(location: str, content: bytes, version: Version | None) -> Version | None:
    """Write an object only if it still has a version (None: if it does not exist); the store decides atomically.

    Returns
    -------
    dict or None
        The object's new version; None if it was not written. It may be None although the object was written: if the
        store's answer is lost, the request is retried and then finds the object changed.

    Raises
    ------
    UnconditionalError
        If the store reports that it does not support conditional writes.
    ResultsError
        If the store refuses it.
    """
    store, key = _parent_store(location, True)
    import obstore

    mode: Any = "create" if version is None else version
    try:
        with translate_errors(location, writing=True):
            return _version_of(obstore.put(store, key, content, mode=mode))
    except _ChangedError:
        return None
    except _NowhereError:
        if version is None:  # the bucket does not exist
            raise
        return None


def write_file(location: str, path: Path) -> str:
    """Copy a file into an object, in parts if it is large; returns the tag of the object.

    Raises
    ------
    ResultsError
        If the store refuses it.
    """
    store, key = _parent_store(location, True)
    import obstore

    with translate_errors(location, writing=True):
        return obstore.put(store, key, path)["e_tag"] or ""


def delete(location: str, paths: Sequence[str] | None = None) -> None:
    """Remove an object, or the objects at some paths below a location; they need not exist.

    Raises
    ------
    ResultsError
        If the store refuses it.
    """
    if paths is not None and not paths:
        return
    store, key = _parent_store(location, True) if paths is None else (_store(location, True), list(paths))
    import obstore

    with suppress(_NowhereError), translate_errors(location, writing=True):
        obstore.delete(store, key)


def copy(location: str, to: str, n_bytes: int) -> None:
    """Copy an object of known size to another location in the same bucket; an object that is gone is skipped.

    Raises
    ------
    ResultsError
        If the store refuses it.
    """
    scheme, _, rest = location.partition("://")
    root = f"{scheme}://{rest.partition('/')[0]}"
    store = _store(root, True)
    import obstore

    source, target = (address.removeprefix(f"{root}/") for address in (location, to))
    with suppress(_NowhereError), translate_errors(to, writing=True):
        if n_bytes <= _COPIED_BYTES:
            obstore.copy(store, source, target)
        else:
            asyncio.run(_stream(store, source, target))


async def _stream(store: Any, source: str, target: str) -> None:
    import obstore

    await obstore.put_async(store, target, (await obstore.get_async(store, source)).stream())


def listing(location: str) -> list[tuple[str, Status]]:
    """List all files or objects below a location, with their relative paths, sorted.

    Files that disappear in the meantime are left out, as are the empty objects that consoles create as folders.

    Raises
    ------
    RecordingError
        If the store cannot be listed; web servers (``https://``) never can.
    """
    if not is_remote(location):
        return sorted(_walk(location))
    import obstore

    with translate_errors(location):
        pages = obstore.list(_store(location, True), chunk_size=1000)
        found = {meta["path"]: _status_of(meta) for page in pages for meta in page}
    if any(not status.size_bytes for status in found.values()):
        folders = {"", *(path[:at] for path in found for at, letter in enumerate(path) if letter == "/")}
        found = {path: status for path, status in found.items() if status.size_bytes or path not in folders}
    return sorted(found.items())


def entries(location: str) -> dict[str, Status | None]:
    """List what lies directly below a location, by name: files or objects with their status, folders with None.

    Files that disappear in the meantime are left out.

    Raises
    ------
    RecordingError
        If the store cannot be listed.
    """
    if not is_remote(location):
        if not os.path.isdir(location):
            return {}
        with os.scandir(location) as entries_here:
            looks = [(one.name, _stat(one.path)) for one in entries_here]
        return {name: None if stat.S_ISDIR(look.st_mode) else _status_of_file(look) for name, look in looks if look}
    import obstore

    with translate_errors(location):
        there = obstore.list_with_delimiter(_store(location, True))
    found: dict[str, Status | None] = {
        PurePosixPath(meta["path"]).name: _status_of(meta) for meta in there["objects"] if meta["path"]
    }
    return found | {PurePosixPath(prefix).name: None for prefix in there["common_prefixes"]}


def can_list(location: str) -> bool:
    """Whether the store of a location can be listed."""
    return not location.startswith("http")


def zarr_store(location: str, *, patient: bool = False) -> Any:
    """Return what ``zarr.open`` accepts for a location: a path or a store.

    Parameters
    ----------
    location : str
    patient : bool
        Retry for minutes instead of seconds if a store does not answer.
    """
    if not is_remote(location):
        return location
    import zarr

    store = _store(location, patient)
    if int(zarr.__version__.partition(".")[0]) >= 3:
        from zarr.storage import ObjectStore

        return ObjectStore(store, read_only=True)
    return _for_zarr_2(store)


def credentials_key() -> Hashable:
    """Return what an open store depends on: credentials and endpoints may change, and a process may be forked."""
    names = sorted(name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_")))
    return os.getpid(), tuple((name, os.environ[name]) for name in names)


@contextmanager
def translate_errors(location: str, *, writing: bool = False) -> Iterator[None]:
    """Turn obstore's errors into ours, which name the location and the remedy and contain no secrets.

    The original errors are dropped on purpose: their texts may contain whole requests. Errors of reading become
    RecordingErrors, those of writing ResultsErrors.
    """
    if not is_remote(location):
        yield
        return
    exceptions = _obstore().exceptions
    scheme = location.partition("://")[0]
    refused, verb = (ResultsError, "written") if writing else (RecordingError, "read")
    try:
        yield
    except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
        raise _ChangedError(f"{location} has changed.") from None
    except NotImplementedError:
        raise UnconditionalError(f"{location} does not support conditional writes.") from None
    except (FileNotFoundError, exceptions.NotFoundError):
        missing = _NowhereError if writing else _MissingError
        raise missing(f"There is nothing at {location}, or there is no such bucket. Check both.") from None
    except (PermissionError, exceptions.BaseError) as error:
        said = str(error).partition("\n")[0]
        if writing and "501 Not Implemented" in said:
            raise UnconditionalError(f"{location} does not support conditional writes.") from None
        refusals = (PermissionError, exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
        if isinstance(error, refusals) or _REFUSALS.search(said):
            advice = _CREDENTIALS.get(scheme, "Only public files can be read from web servers")
            raise refused(
                f"{location} may not be {verb} with the credentials found, if any (or does not exist, which some "
                f"stores do not distinguish). {advice}."
            ) from None
        advice = _ADVICE.get(scheme, "Check the address")
        raise refused(
            f"{location} cannot be {verb} ({_without_secrets(said)}). {advice}. Also check the network."
        ) from None


class _MissingError(RecordingError):
    """The object does not exist."""


class _NowhereError(ResultsError):
    """The object, or the bucket to write to, does not exist."""


class _ChangedError(ResultsError):
    """The object exists already, or has another version."""


class UnconditionalError(ResultsError):
    """The store does not support conditional writes."""


def _without_secrets(text: str) -> str:
    """First line of an error's text, without response bodies and without queries and users in URLs."""
    line = text.partition("\n")[0].partition("<")[0]
    return re.sub(r"://[^/\s]*@", "://", re.sub(r"\?\S*", "", line)).strip(" -:")[:300]


def _status_of(meta: Any) -> Status:
    return Status(int(meta["size"]), meta["e_tag"] or str(meta["last_modified"]))


def _stat(path: str) -> os.stat_result | None:
    """Status of a path; of a broken or circular link, the link's own; None if it does not exist."""
    with suppress(OSError):
        return os.stat(path)
    with suppress(FileNotFoundError):
        return os.lstat(path)
    return None


def _status_of_file(found: os.stat_result) -> Status:
    return Status(found.st_size, str(found.st_mtime_ns))


def _version_of(meta: Any) -> Version:
    return {name: meta[name] for name in ("e_tag", "version") if meta[name] is not None}


def _walk(folder: str) -> Iterator[tuple[str, Status]]:
    for where, _, names in os.walk(folder):
        for name in names:
            path = Path(where, name)
            if look := _stat(str(path)):
                yield path.relative_to(folder).as_posix(), _status_of_file(look)


def _obstore() -> Any:
    try:
        import obstore
        import obstore.exceptions
    except ImportError as error:
        raise MissingDependencyError(
            "Recordings on object stores and web servers need obstore; install it with: pip install 'ks4stream[cloud]'."
        ) from error
    return obstore


def _parent_store(location: str, patient: bool) -> tuple[Any, str]:
    """The store of an object's parent, and the object's name in it."""
    parent, _, _ = location.rpartition("/")
    if parent.endswith("/"):
        raise RecordingError(f"{location} is a whole bucket or server; give what lies in it ({location}/NAME).")
    return _store(parent, patient), name_of(location)


def _store(location: str, patient: bool) -> Any:
    """A store with its root at the location, with this process's credentials."""
    return _opened_store(location, patient, credentials_key())


@lru_cache(maxsize=64)
def _opened_store(location: str, patient: bool, _: Hashable) -> Any:
    _obstore()
    from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

    scheme, _, rest = location.partition("://")
    bucket, _, key = rest.partition("/")
    options: dict[str, Any] = {"client_options": CONNECTION, "retry_config": PATIENT if patient else HASTY}
    if scheme.startswith("http"):
        return HTTPStore(location, **options)
    options["prefix"] = key or None
    with translate_errors(location):
        if scheme == "gs":
            return GCSStore(bucket, **options)
        if scheme == "az":
            return AzureStore(bucket, **options)
        return S3Store(bucket, **options, **_s3_credentials())


def _s3_credentials() -> dict[str, Any]:
    """S3 credentials from all places that Amazon's own tools search; anonymous if there are none."""
    try:
        import boto3
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise MissingDependencyError(
            "Recordings on s3:// need boto3, which finds the credentials; install it with: pip install "
            "'ks4stream[cloud]'."
        ) from error
    asked = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "yes", "on")
    session = boto3.Session()
    if asked or session.get_credentials() is None:
        return {"skip_signature": True} | ({"region": session.region_name} if session.region_name else {})
    return {"credential_provider": Boto3CredentialProvider(session)}


def _for_zarr_2(store: Any) -> Any:
    """A store as zarr 2 accepts it: a mapping that fetches the chunks of one read together."""
    from concurrent.futures import ThreadPoolExecutor

    import obstore
    import zarr.storage

    base: Any = zarr.storage.Store  # type: ignore[attr-defined] # the type checker knows version 3

    class Objects(base):  # type: ignore[misc]
        def __getitem__(self, key: str) -> bytes:
            try:
                return bytes(obstore.get(store, key).bytes())
            except FileNotFoundError:
                raise KeyError(key) from None

        def getitems(self, keys: Any, *, contexts: Any) -> dict[str, bytes]:
            with ThreadPoolExecutor(8) as pool:
                found = zip(keys, pool.map(self.get, keys), strict=True)
                return {key: value for key, value in found if value is not None}

        def __iter__(self) -> Iterator[str]:
            return (meta["path"] for page in obstore.list(store, chunk_size=1000) for meta in page)

        def listdir(self, path: str = "") -> list[str]:
            found = obstore.list_with_delimiter(store, path or None)
            paths = [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]
            return [PurePosixPath(entry).name for entry in paths]

        def __len__(self) -> int:
            return sum(1 for _ in self)

        def __setitem__(self, key: str, value: Any) -> None:
            raise PermissionError("This store is read-only.")

        def __delitem__(self, key: str) -> None:
            raise PermissionError("This store is read-only.")

    return Objects()
