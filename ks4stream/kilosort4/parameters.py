"""Stand-in."""

from __future__ import annotations

from ks4stream.settings import Settings

DEFAULT_SETTINGS = {"n_chan_bin": None, "fs": 30000, **Settings().to_dict()}
