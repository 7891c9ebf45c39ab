"""How much of a disk a cache may take: an account in its folder, which all processes of the machine share."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

from filelock import FileLock

SHARE_OF_FREE = 0.5  # of what is free on the disk, that a cache may take
ROOM, _ROOM_FORMAT = "room", struct.Struct("<qq")  # the file that counts bytes: allowed, taken


def take(folder: Path, n_bytes: int, limit_bytes: int | None) -> bool:
    """Whether a cache has room for so many bytes more, which are taken then.

    What is taken is counted again if the account is empty, or cut short: it is new, or a crash or a full disk came
    between its emptying and its writing.

    Raises
    ------
    FileNotFoundError
        If there is no account: the cache was removed.
    """
    account = folder / ROOM
    if not account.exists():  # before the lock, which would make the folder
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
