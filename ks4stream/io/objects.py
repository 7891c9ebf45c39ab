"""Files, and objects in stores that are reached by HTTP, by one set of names.

A *location* is a text: the absolute path of a file or folder, or a URL (``s3://``, ``gs://``, ``az://``, ``https://``,
``http://``). It is all that travels to workers: each process opens stores itself, with the credentials it finds in its
own surroundings, and nothing secret is ever part of a location. What fails for a moment is tried again, with pauses
that grow and are partly random; what fails for good becomes a :class:`~ks4stream.errors.RecordingError`.
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
HASTY = {"max_retries": 4, "retry_timeout": timedelta(seconds=15), "backoff": BACKOFF}  # to tell mistakes soon
PATIENT = {"max_retries": 10, "retry_timeout": timedelta(minutes=5), "backoff": BACKOFF}  # hours of work are at stake
LARGEST_METADATA_BYTES = 1 << 25  # a file that describes recordings or probes and has more is something else
_COPIED_BYTES = 5 << 30  # that stores copy themselves by one request; S3 no more
_ADVICE = {
    "s3": "Check bucket, AWS_REGION, and AWS_ENDPOINT_URL where the store is not Amazon's",
    "gs": "Check the bucket; one that is public needs GOOGLE_SKIP_SIGNATURE=true",
    "az": "Check the container and AZURE_STORAGE_ACCOUNT_NAME; one that is public needs AZURE_SKIP_SIGNATURE=true",
}
_CREDENTIALS = {
    "s3": "Check AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws; where anybody may read, set "
    "AWS_SKIP_SIGNATURE=true",
    "gs": "Check GOOGLE_APPLICATION_CREDENTIALS; where anybody may read, set GOOGLE_SKIP_SIGNATURE=true",
    "az": "Check AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY; where anybody may read, set "
    "AZURE_SKIP_SIGNATURE=true",
}
# What obstore says, as an error of no kind, where listing is refused, no credentials were found, or a key is none.
_REFUSALS = re.compile("status code: 40[13]|token request|Invalid Access Key")


@dataclass(frozen=True)
class Status:
    """What is known of a file or an object without reading it.

    Attributes
    ----------
    size_bytes : int
    tag : str
        Changes when the content does: time of change of a file, ETag of an object.
    """

    size_bytes: int
    tag: str


Version = dict[str, str]
"""By what a store tells the contents that an object has had: their ETags, or their generations."""


class Versioned(NamedTuple):
    """What an object holds, and which of its versions that is."""

    content: bytes
    version: Version


def locate(path: str | os.PathLike[str]) -> str:
    """Return where something lies, in the same words for every process: an absolute path, or a URL as it was given.

    Raises
    ------
    RecordingError
        If a URL is of an unknown scheme, or carries a user, a password or a query: those may be secrets, and a
        location is shown in logs and sent to workers.
    """
    text = os.fspath(path)
    scheme, mark, rest = text.partition("://")
    if not mark:
        return os.path.abspath(os.path.expanduser(text))
    if scheme == "file":
        return os.path.abspath(url2pathname(urlsplit(text).path))
    if scheme not in SCHEMES:
        known = ", ".join(f"{one}://" for one in (*SCHEMES, "file"))
        raise RecordingError(f"Recordings cannot be read from {scheme}://; known are {known}, and paths.")
    host, _, key = rest.partition("/")
    if "@" in host or (scheme in ("https", "http") and "?" in key):
        raise RecordingError(
            f"The {scheme}:// address carries a user, a password or a query (after '?'), which would be shown in logs "
            "and sent to workers. Leave them out, and give credentials in the environment (for s3://, gs://, az://)."
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
    """Return the last part of a location, for messages and for what is called after it."""
    name = PurePosixPath(location).name if is_remote(location) else os.path.basename(location)
    return unquote(name) if location.startswith("http") else name


def child(location: str, name: str) -> str:
    """Return the location of what lies below another; `name` may have several parts."""
    return f"{location}/{name}" if is_remote(location) else os.path.join(location, name)


def status(location: str) -> Status | None:
    """Look at a file or an object.

    Returns
    -------
    Status or None
        None if there is none.

    Raises
    ------
    RecordingError
        If a store cannot be asked.
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
        Fewer than asked for where it ends before. What is made of it may be written to.

    Raises
    ------
    RecordingError
        If it cannot be read.
    """
    if not is_remote(location):
        try:
            with open(location, "rb") as file:
                file.seek(start)
                content = np.empty(max(stop - start, 0), np.uint8).data  # a bytearray would be cleared first
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
    """Read all of a file or an object that describes others.

    Raises
    ------
    RecordingError
        If it cannot be read, or is larger than any description is.
    """
    if size_bytes > LARGEST_METADATA_BYTES:
        raise RecordingError(
            f"{location} has {size_bytes} bytes; of what describes a recording or a probe, {LARGEST_METADATA_BYTES} "
            "are read at most. Is it another file?"
        )
    return bytes(read_bytes(location, 0, size_bytes))


def read_versioned(location: str) -> Versioned | None:
    """Read a small object, with its version; None if there is none.

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
    """Write an object if it is still of a version, or, of None, if there is none; the store decides, in one step.

    Returns
    -------
    dict or None
        The object's version now; None if it was not written. That may also be said where it was: a first answer
        was lost, and what was asked again then found the object written.

    Raises
    ------
    UnconditionalError
        If the store says that it cannot decide that.
    ResultsError
        If it refuses it.
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
        if version is None:  # there is no bucket
            raise
        return None


def write_file(location: str, path: Path) -> str:
    """Copy a file into an object, in parts where it is large; returns the tag that it got.

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
    """Remove an object, or, of a list, objects below a location by their paths from there; they need not be there.

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
    """Copy an object of a known size to another location of the same bucket; one that has gone is passed over.

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
    """List all files or objects below a location, with their paths from there, sorted.

    Files that go meanwhile are left out, as are the empty objects that consoles make in place of folders.

    Raises
    ------
    RecordingError
        If a store cannot be asked; web servers (``https://``) never can.
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
    """List what lies directly below a location, by name: files or objects, and folders, of which the status is None.

    Files that go meanwhile are left out.

    Raises
    ------
    RecordingError
        If a store cannot be asked.
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
    """Whether one can ask what lies below a location."""
    return not location.startswith("http")


def zarr_store(location: str, *, patient: bool = False) -> Any:
    """Return what ``zarr.open`` takes for a location: a path, or a store.

    Parameters
    ----------
    location : str
    patient : bool
        Try for minutes where a store does not answer, instead of seconds.
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
    """Return what an open store depends on: credentials and endpoints may be changed, and processes be forked."""
    names = sorted(name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_")))
    return os.getpid(), tuple((name, os.environ[name]) for name in names)


@contextmanager
def translate_errors(location: str, *, writing: bool = False) -> Iterator[None]:
    """Turn what obstore raises into errors that name the location and the remedy, and no secrets.

    The errors it turns are dropped on purpose: their texts may hold whole requests. Of recordings they are
    RecordingErrors, of what is written ResultsErrors.
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
        raise _ChangedError(f"{location} is not what it was.") from None
    except NotImplementedError:
        raise UnconditionalError(f"{location} cannot be written on conditions.") from None
    except (FileNotFoundError, exceptions.NotFoundError):
        missing = _NowhereError if writing else _MissingError
        raise missing(f"There is nothing at {location}, or there is no such bucket. Check both.") from None
    except (PermissionError, exceptions.BaseError) as error:
        said = str(error).partition("\n")[0]
        if writing and "501 Not Implemented" in said:
            raise UnconditionalError(f"{location} cannot be written on conditions.") from None
        refusals = (PermissionError, exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
        if isinstance(error, refusals) or _REFUSALS.search(said):
            advice = _CREDENTIALS.get(scheme, "Only what anybody may read can be read from web servers")
            raise refused(
                f"{location} may not be {verb} with the credentials found, if any (or does not exist, which some "
                f"stores do not tell apart). {advice}."
            ) from None
        advice = _ADVICE.get(scheme, "Check the address")
        raise refused(f"{location} cannot be {verb} ({_without_secrets(said)}). {advice}, and the network.") from None


class _MissingError(RecordingError):
    """There is no such object."""


class _NowhereError(ResultsError):
    """There is no such object, or no bucket to write to."""


class _ChangedError(ResultsError):
    """There is such an object already, or it is of another version."""


class UnconditionalError(ResultsError):
    """The store does not write on conditions."""


def _without_secrets(text: str) -> str:
    """First line of an error's text, without bodies of answers, queries and users of URLs."""
    line = text.partition("\n")[0].partition("<")[0]
    return re.sub(r"://[^/\s]*@", "://", re.sub(r"\?\S*", "", line)).strip(" -:")[:300]


def _status_of(meta: Any) -> Status:
    return Status(int(meta["size"]), meta["e_tag"] or str(meta["last_modified"]))


def _stat(path: str) -> os.stat_result | None:
    """Of a link that leads nowhere, or round in a circle, the link's own; None of what is not there."""
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
    """The store of what lies beside an object, and the object's name in it."""
    parent, _, _ = location.rpartition("/")
    if parent.endswith("/"):
        raise RecordingError(f"{location} names a whole store; give what lies in it ({location}/NAME).")
    return _store(parent, patient), name_of(location)


def _store(location: str, patient: bool) -> Any:
    """A store whose root is the location, with this process's credentials."""
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
    """Where S3's credentials come from: all places that Amazon's own tools look at; none means anonymous."""
    try:
        import boto3
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise MissingDependencyError(
            "Recordings on s3:// need boto3, which knows where credentials are; install it with: pip install "
            "'ks4stream[cloud]'."
        ) from error
    asked = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "yes", "on")
    session = boto3.Session()
    if asked or session.get_credentials() is None:
        return {"skip_signature": True} | ({"region": session.region_name} if session.region_name else {})
    return {"credential_provider": Boto3CredentialProvider(session)}


def _for_zarr_2(store: Any) -> Any:
    """A store as version 2 of zarr takes it: a mapping, that fetches chunks of one read together."""
    from concurrent.futures import ThreadPoolExecutor

    import obstore
    import zarr.storage

    base: Any = zarr.storage.Store  # type: ignore[attr-defined] # as types version 3 is known

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
            raise PermissionError("This store is read only.")

        def __delitem__(self, key: str) -> None:
            raise PermissionError("This store is read only.")

    return Objects()
