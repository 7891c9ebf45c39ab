"""How much disk space a cache may use: an account in its folder, shared by all processes of the machine."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

from filelock import FileLock

SHARE_OF_FREE = 0.5  # of the free disk space that a cache may use
ROOM, _ROOM_FORMAT = "room", struct.Struct("<qq")  # the file that counts bytes: allowed, used


def take(folder: Path, n_bytes: int, limit_bytes: int | None) -> bool:
    """Reserve this many more bytes in a cache, if it has room; returns whether it has.

    Used bytes are counted again if the account is empty or truncated: it is new, or a crash or a full disk prevented
    its rewriting.

    Raises
    ------
    FileNotFoundError
        If there is no account: the cache was removed.
    """
    account = folder / ROOM
    if not account.exists():  # before the lock, which would create the folder
        raise FileNotFoundError(account)
    with FileLock(folder / f"{ROOM}.lock"):
        content = account.read_bytes()
        if len(content) == _ROOM_FORMAT.size:
            limit, taken = _ROOM_FORMAT.unpack(content)
        else:
            taken = sum(path.stat().st_size for path in folder.glob("*.piece"))
            limit = int(SHARE_OF_FREE * (shutil.disk_usage(folder).free + taken))
        fits = taken + n_bytes <= (limit if limit_bytes is None else limit_bytes)
        account.write_bytes(_ROOM_FORMAT.pack(limit, taken + n_bytes * fits))
        return bool(fits)
