"""What mtscomp has compressed is read as it was."""

from __future__ import annotations

import json
import pickle
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ks4stream.errors import Ks4StreamWarning, RecordingError
from ks4stream.io.recordings import may_tell_rate, open_recording
from ks4stream.io.sources.cbin import CbinSource
from ks4stream.recording import Source

# Full-scale samples too, whose differences wrap
SAMPLES = np.random.default_rng(4).integers(-(2**15), 2**15, (250, 5)).astype(np.int16)
META = "typeThis=imec\nnSavedChans=5\nsnsApLfSy=4,0,1\nimSampRate=100\nfileSizeBytes=2500\nfirstSample={first}\n"


def compress(folder: Path, name: str = "a", samples: Any = SAMPLES, **options: Any) -> Path:
    """Chunks of one second, 100 samples, the last of 50."""
    mtscomp = pytest.importorskip("mtscomp")
    flat = folder / f"{name}.flat"
    samples.tofile(flat)
    out = folder / f"{name}.cbin"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own
        mtscomp.compress(
            flat,
            out,
            folder / f"{name}.ch",
            sample_rate=100.0,
            n_channels=samples.shape[1],
            dtype=samples.dtype,
            n_threads=1,
            check_after_compress=False,
            **options,
        )
    flat.unlink()
    return out


@pytest.mark.parametrize("order", ["F", "C"])
@pytest.mark.parametrize(("do_time_diff", "do_spatial_diff"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", ["int16", "uint16", "int32"])
def test_all_ways_of_storing(order: str, do_time_diff: bool, do_spatial_diff: bool, dtype: str, tmp_path: Path) -> None:
    samples = SAMPLES.astype(dtype)
    path = compress(
        tmp_path, samples=samples, chunk_order=order, do_time_diff=do_time_diff, do_spatial_diff=do_spatial_diff
    )
    source = CbinSource.open(path)
    assert isinstance(source, Source) and (source.n_samples, source.n_channels, source.dtype) == (250, 5, dtype)
    for start, stop in [(0, 250), (0, 1), (99, 101), (100, 200), (199, 250), (249, 250), (7, 7), (250, 250)]:
        block = source.read(start, stop)
        assert block.dtype == source.dtype and block.flags.writeable
        np.testing.assert_array_equal(block, samples[start:stop])
    copy = pickle.loads(pickle.dumps(source))
    assert copy == source and copy.digest() == source.digest()


def test_with_and_without_metadata(tmp_path: Path) -> None:
    path = compress(tmp_path, "run_g0_t0.imec0.ap")
    assert open_recording(path).sampling_rate_hz == 100.0 and may_tell_rate(path)  # the index tells it
    path.with_suffix(".meta").write_text(META.format(first=0))
    first = open_recording(path, n_chan=5)
    np.testing.assert_array_equal(first.read(0, 250), SAMPLES)
    with pytest.raises(RecordingError, match="n_chan=4, but"):
        open_recording(path, n_chan=4)
    later = compress(tmp_path, "run_g0_t1.imec0.ap")
    later.with_suffix(".meta").write_text(META.format(first=300))
    with pytest.warns(Ks4StreamWarning, match="50 samples .* are missing between"):
        np.testing.assert_array_equal(open_recording([path, later]).read(240, 260), SAMPLES[np.arange(240, 260) % 250])


def test_objects_are_read_alike(object_store: Any, tmp_path: Path) -> None:
    url = object_store.put(compress(tmp_path), "cbin/a.cbin")
    object_store.put(tmp_path / "a.ch", "cbin/a.ch")
    np.testing.assert_array_equal(open_recording(url).read(90, 210), SAMPLES[90:210])


def test_what_is_missing_or_damaged_is_an_error(tmp_path: Path) -> None:
    path = compress(tmp_path)
    index = json.loads((tmp_path / "a.ch").read_text())
    for change in ({"algorithm": "lz4"}, {"chunk_bounds": [0, 200, 100, 250]}, {"chunk_offsets": [0]}, {"dtype": "x"}):
        (tmp_path / "a.ch").write_text(json.dumps(index | change))
        with pytest.raises(RecordingError, match=r"a\.ch is not an index of mtscomp"):
            open_recording(path)
    (tmp_path / "a.ch").write_text("{")
    with pytest.raises(RecordingError, match="is not an index of mtscomp"):
        open_recording(path)
    (tmp_path / "a.ch").write_text(json.dumps(index))
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    with pytest.raises(RecordingError, match=r"has \d+ bytes, but a\.ch says \d+: copy both again"):
        open_recording(path)
    path.write_bytes(content[:900] + b"xxxxxxxxx" + content[909:])
    source = CbinSource.open(path)
    with pytest.raises(RecordingError, match=r"Samples 0 to 100 of .* are damaged"):
        source.read(20, 30)
    np.testing.assert_array_equal(source.read(100, 250), SAMPLES[100:])
    (tmp_path / "a.ch").unlink()
    with pytest.raises(RecordingError, match=r"There is no .*a\.ch; a \.cbin is read by the \.ch beside it"):
        open_recording(path)


@pytest.mark.parametrize("written", [b"\0" * 2**25, SAMPLES[:50].tobytes(), SAMPLES[:101].tobytes()])
def test_a_chunk_that_holds_more_or_less_is_damaged_and_no_more_is_unpacked(
    written: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = zlib.compress(written)
    (tmp_path / "a.cbin").write_bytes(packed)
    index = {
        "algorithm": "zlib",
        "chunk_order": "F",
        "n_channels": 5,
        "dtype": "int16",
        "chunk_bounds": [0, 100],
        "chunk_offsets": [0, len(packed)],
        "do_time_diff": True,
        "do_spatial_diff": False,
        "sample_rate": 100.0,
    }
    (tmp_path / "a.ch").write_text(json.dumps(index))
    source = CbinSource.open(tmp_path / "a.cbin")
    tracemalloc.start()
    try:
        with pytest.raises(RecordingError, match=r"Samples 0 to 100 of .* are damaged"):
            source.read(0, 100)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("text", ['{"algorithm": "zlib", "chunk_order": "F", "n_channels": Infinity}', "[" * 100_000])
def test_an_index_of_nonsense_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.cbin").write_bytes(b"x")
    (tmp_path / "a.ch").write_text(text)
    with pytest.raises(RecordingError, match=r"a\.ch is not an index of mtscomp"):
        CbinSource.open(tmp_path / "a.cbin")


def test_an_index_as_large_as_a_recording_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.cbin").write_bytes(b"x")
    with (tmp_path / "a.ch").open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(RecordingError, match=r"a\.ch has 1099511627776 bytes.*Check that it is the right file"):
        CbinSource.open(tmp_path / "a.cbin")
