"""Files that are not flat are told by what they hold or are called; flat ones never are, whatever they begin with."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import io
import json
import lzma
import sqlite3
import struct
import tarfile
import wave
import zipfile
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest

from ks4stream.errors import RecordingError
from ks4stream.io.formats import HEAD_BYTES, NOT_FLAT, is_text, refusal
from ks4stream.io.recordings import open_recording

SAMPLES = np.random.default_rng(1).normal(0, 40, (4000, 4)).astype(np.int16)
FLAT = SAMPLES.tobytes()
REAL_CLIP = Path(__file__).resolve().parents[3] / "shared" / "data" / "np2-real" / "run1.bin"


def packed(kind: str) -> bytes:
    """A ZIP or a tar archive with one member."""
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("a.bin", FLAT)
    elif kind == "npz":
        np.savez(buffer, traces=SAMPLES)
    elif kind == "wave":
        with wave.open(buffer, "wb") as file:
            file.setnchannels(4)
            file.setsampwidth(2)
            file.setframerate(30000)
            file.writeframes(FLAT)
    else:
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
            member = tarfile.TarInfo("a.bin")
            member.size = len(FLAT)
            archive.addfile(member, io.BytesIO(FLAT))
    return buffer.getvalue()


def database() -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.execute("create table spikes (sample integer)")
    content: bytes = connection.serialize()
    connection.close()
    return content


def after(head: bytes, size: int = 0) -> bytes:
    """Flat samples with a vendor's header before them."""
    return head.ljust(size, b"\x00") + FLAT


TABLE = "time,channel,value\n" + "".join(f"{i},{i % 4},{i * 3}\n" for i in range(200))

# Content under a name that says nothing, and what has to be said of it
CONTENTS: dict[str, tuple[bytes, str]] = {
    "blackrock": (after(b"NEURALCD\x02\x03", 314), r"a Blackrock.*extractors\.read_blackrock\('/.*'\)\.save\("),
    "blackrock 2.1": (after(b"NEURALSG30 kS/s", 32), r"read_blackrock"),
    "events": (after(b"NEURALEV\x02\x03", 336), r"events and snippets.*\.ns5"),
    "neuralynx": (after(b"######## Neuralynx Data File Header\r\n", 16384), r"read_neuralynx\('/.*told[0-9]*'\)"),
    "intan rhd": (after(struct.pack("<Ihhf", 0xC6912702, 3, 1, 30000.0)), r"an Intan file.*read_intan"),
    "intan rhs": (after(struct.pack("<Ihhf", 0xD69127AC, 1, 0, 20000.0)), r"an Intan file"),
    "open ephys": (after(b"header.format = 'Open Ephys Data Format'; \nheader.version = 0.4;", 1024), "read_openephys"),
    "plexon": (after(struct.pack("<Ii", 0x58454C50, 107) + b"a comment", 7504), "read_plexon"),
    "spikegadgets": (
        after(b'<?xml version="1.0"?>\n<Configuration>\n' + b' <Setting name="a"/>\n' * 99 + b"</Configuration>\n"),
        "read_spikegadgets",
    ),
    "bdf": (after(b"\xffBIOSEMI", 256), "read_edf"),
    "hdf5": (after(b"\x89HDF\r\n\x1a\n"), r"an HDF5 file.*h5py\.File\(.*read_nwb_recording"),
    "matlab 7.3": (after(b"MATLAB 7.3 MAT-file, Platform", 512) + b"\x89HDF\r\n\x1a\n", "a MATLAB file.*h5py"),
    "hdf5 later": (after(bytes(512) + b"\x89HDF\r\n\x1a\n"), "an HDF5 file"),
    "sqlite": (database(), "an SQLite database"),
    "zip": (packed("zip"), "a ZIP archive"),
    "npz": (packed("npz"), "a ZIP archive"),
    "tar": (packed("tar"), "a tar archive"),
    "wave": (packed("wave"), "a WAVE file"),
    "gzip": (gzip.compress(FLAT), "compressed by gzip.*decompress it first"),
    "xz": (lzma.compress(FLAT), "compressed by xz"),
    "bzip2": (bz2.compress(FLAT), "compressed by bzip2"),
    "zstd": (bytes(numcodecs.Zstd(level=3).encode(FLAT)), "compressed by Zstandard"),
    "csv": (TABLE.encode(), r"text \(its first bytes are readable\).*numpy\.loadtxt"),
    "utf-8 csv": (TABLE.replace("value", "µV").encode("utf-8-sig"), r"text \(its first bytes are readable\)"),
    "json": (json.dumps({"chanMap": list(range(50)), "xc": [0] * 50}).encode(), "text"),
    "xml": (b"<?xml version='1.0'?>\n" + b"<parameters><nChannels>32</nChannels></parameters>\n" * 9, "text"),
    "git lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a2146" * 8 + b"\nsize 12345\n",
        "Git LFS.*git lfs pull",
    ),
    "git annex": (b"/annex/objects/MD5E-s123--" + b"4d7a2146" * 4 + b".bin\n", "git-annex.*datalad get"),
    "web page": (b"<!DOCTYPE html>\n<html>" + b"<p>Sign in to go on.</p>\n" * 9, "a web page.*download it again"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_what_a_file_holds_is_told_under_any_name(kind: str, tmp_path: Path) -> None:
    content, message = CONTENTS[kind]
    for name in ("x.bin", "x", "x.DAT"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RecordingError, match=f"cannot be read as samples: it is .*{message}") as caught:
            open_recording(tmp_path / name, n_chan=1, fs=30000)
        assert "name that ends with .bin" not in str(caught.value)  # which would not help


@pytest.mark.parametrize("suffix", [suffix for one in NOT_FLAT for suffix in one.suffixes])
def test_what_a_file_is_called_is_told_and_renaming_helps(suffix: str, tmp_path: Path) -> None:
    for name in (f"x{suffix}", f"X{suffix.upper()}"):
        (tmp_path / name).write_bytes(FLAT)
        with pytest.raises(RecordingError, match=rf"by its suffix \{suffix}\); .*rename it to end in \.bin"):
            open_recording(tmp_path / name, n_chan=4, fs=30000)
        (tmp_path / name).rename(tmp_path / "x.bin")
        assert open_recording(tmp_path / "x.bin", n_chan=4, fs=30000).n_samples == 4000


@pytest.mark.parametrize(
    ("name", "kind", "what"),
    [
        ("x.nwb", "hdf5", r"an NWB file \(by its first bytes"),
        ("x.npz", "npz", r"an archive of NumPy arrays.*numpy\.load"),
        ("x.ns5", "gzip", "compressed by gzip"),  # and not a Blackrock file yet
        ("x.npy", "gzip", "compressed by gzip"),
        ("x.meta", "csv", r"metadata \(its first bytes are readable\).*pass the \.bin file next to it"),
        ("x.nwb", "git lfs", "a pointer of Git LFS"),
    ],
)
def test_name_and_content_together_say_more(name: str, kind: str, what: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(CONTENTS[kind][0])
    with pytest.raises(RecordingError, match=f"it is {what}"):
        open_recording(tmp_path / name, n_chan=1, fs=30000)


# -- no false alarm ------------------------------------------------------------------------------------


def recordings() -> dict[str, np.ndarray[Any, Any]]:
    """Flat data of every kind, among it such as lies near text."""
    rng = np.random.default_rng(3)
    n = HEAD_BYTES
    printable = rng.integers(0x20, 0x7F, (n, 2)).astype(np.uint8)
    printable[::7, 1] = 0  # one sample in seven is small
    return {
        "noise": rng.normal(0, 30, n).astype(np.int16),
        "positive": rng.integers(0, 127, n).astype(np.int16),  # as text in UTF-16 is
        "full range": rng.integers(-(2**15), 2**15, n).astype(np.int16),
        "unsigned": (32768 + rng.normal(0, 30, n)).astype(np.uint16),
        "14 bits": (8200 + rng.normal(0, 30, n)).astype(np.uint16),  # 0x2008: spaces in every other byte
        "all spaces": np.full(n, 0x2020, np.int16),
        "all line breaks": np.full(n, 0x0A0A, np.int16),
        "saturated": np.where(rng.random(n) < 0.5, 0x7E7E, 0x2020).astype(np.int16),
        "partly printable": printable.view(np.int16),
        "zeros": np.zeros(n, np.int16),
        "minus one": np.full(n, -1, np.int16),
        "float": rng.normal(0, 1e-4, n).astype(np.float32),
        "float volts": rng.normal(0, 50, n).astype(np.float64),
        "ramp": np.arange(n).astype(np.int16),
    }


@pytest.mark.parametrize("kind", recordings())
def test_flat_samples_are_never_taken_for_something_else(kind: str) -> None:
    content = recordings()[kind].tobytes()
    assert refusal("x.bin", content[:HEAD_BYTES]) is None


@pytest.mark.parametrize("scale", [1, 30, 300, 3000])
def test_samples_that_begin_with_a_short_magic_number_by_chance_stay_samples(scale: int) -> None:
    """Whatever follows four bytes of gzip, ZIP, Zstandard, Intan, Plexon, XML or HTML is noise, and harmless."""
    short = [(offset, magic) for one in NOT_FLAT for offset, magic in one.magic if len(magic) < 8]
    assert len(short) >= 7
    for seed in range(300):
        noise = np.random.default_rng([seed, scale]).normal(0, scale, HEAD_BYTES // 2).astype(np.int16).tobytes()
        for offset, magic in short:
            content = noise[:offset] + magic + noise[offset + len(magic) :]
            assert refusal("x.bin", content) is None, (seed, magic)


def test_magic_numbers_are_long_or_proved() -> None:
    for one in NOT_FLAT:
        assert one.proof is not None or all(len(magic) >= 8 for _, magic in one.magic), one.what


def test_text_needs_a_kilobyte_of_it_with_line_breaks() -> None:
    text = TABLE.encode()
    assert is_text(text) and is_text(text[:200]) and not is_text(text[:20])
    assert not is_text(text[:1000] + FLAT)
    assert not is_text(b"x" * 999 + b"\n")  # samples of one value
    assert not is_text(b"abcdefghijklmnop" * 90)  # no line ends
    assert is_text(("µ" + TABLE).encode()[:1025])
    assert not is_text(TABLE.encode("utf-16"))  # ordinary small samples look like that


# -- NumPy under a flat name, folders, stores ----------------------------------------------------------


def test_a_text_is_not_shown() -> None:
    """It may be a key, given by mistake, and messages are kept in logs."""
    said = refusal("x.bin", b"AKIAIOSFODNN7EXAMPLE\nwJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY\n" * 20)
    assert said is not None and "readable" in said and "EXAMPLE" not in said


@pytest.mark.parametrize("name", ["x.bin", "x", "X.NPY"])
def test_a_npy_file_is_read_as_one_under_any_name(name: str, tmp_path: Path) -> None:
    with (tmp_path / name).open("wb") as file:
        np.save(file, SAMPLES)
    recording = open_recording(tmp_path / name, n_chan=4, fs=30000)
    np.testing.assert_array_equal(recording.read(0, 4000), SAMPLES)
    with pytest.raises(RecordingError, match=r"n_chan=2, but .* of 4 channels"):
        open_recording(tmp_path / name, n_chan=2, fs=30000)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["structure.oebin", "continuous/A/continuous.dat"], r"an Open Ephys recording\).*continuous\.dat"),
        (["Record Node 101/experiment1/recording1/structure.oebin"], "an Open Ephys recording"),
        (["100_CH1.continuous", "100_CH2.continuous"], r"read_openephys\('"),
        (["r_g0_imec0/r_g0_t0.imec0.ap.bin", "r_g0_imec0/r_g0_t0.imec0.ap.meta"], r"t0\.imec0\.ap\.bin\)"),
        (["a.ap.cbin", "a.ap.ch"], r"in order of time \(a\.ap\.cbin\)"),
        (["binary.json", "traces_cached_seg0.raw"], r"traces_cached_seg0\.raw"),
        (["info.rhd", "amplifier.dat"], r"amplifier\.dat"),
        (["CSC1.ncs"], "read_neuralynx"),
        (["block.tsq", "block.tev"], "read_tdt"),
        (["raw.mda"], "read_mda_recording"),
        ([".zmetadata", "traces_seg0/.zarray"], r"\.zgroup or zarr\.json is missing.*copy it again"),
        (["g/.zarray"], r"the array's own path \(g.\.zarray"),
        (["a.bin", "b.bin", "c.bin", "d.bin", "e.bin"], r"\(a\.bin, b\.bin, c\.bin, d\.bin, …\)"),
        (
            ["params.py", "spike_times.npy", "temp_wh.dat", "sorting.zarr/unit/.zarray"],
            "of a sort.*recording that was sorted",
        ),
        (["params.py", "spike_times.npy", "temp_wh.dat", "raw.dat"], r"give the files themselves \(raw\.dat\)"),
        (
            ["data.bin", "kilosort4/params.py", "kilosort4/spike_times.npy", "kilosort4/sorting.zarr/unit/.zarray"],
            r"flat binaries\); give the files themselves \(data\.bin\)",
        ),
        (["notes.md"], "is a folder, but not a Zarr array or group"),
    ],
)
def test_a_folder_is_told_by_what_lies_in_it(files: list[str], message: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(RecordingError, match=message):
        open_recording(tmp_path, fs=30000)


def test_objects_are_told_by_the_same_evidence(object_store: Any) -> None:
    url = object_store.put(CONTENTS["gzip"][0], "told/x.bin")
    with pytest.raises(RecordingError, match=r"s3://.*x\.bin cannot be read as samples: it is compressed by gzip"):
        open_recording(url, n_chan=1, fs=30000)
    url = object_store.put(FLAT, "told/x.ns5")
    with pytest.raises(RecordingError, match=r"read_blackrock\('x\.ns5'\)"):
        open_recording(url, n_chan=4, fs=30000)


@pytest.mark.skipif(importlib.util.find_spec("h5py") is not None, reason="h5py is installed")
def test_the_extra_that_reads_hdf5_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.nwb").write_bytes(CONTENTS["hdf5"][0])
    with pytest.raises(RecordingError, match=r"an NWB file.*pip install 'ks4stream\[hdf5\]'"):
        open_recording(tmp_path / "a.nwb")


@pytest.mark.skipif(not REAL_CLIP.is_file(), reason="the real Neuropixels clip is not beside this checkout")
def test_real_samples_are_never_taken_for_something_else() -> None:
    content = REAL_CLIP.read_bytes()
    for start in range(0, len(content) - HEAD_BYTES, 770 * 20):  # as if the file began there
        assert refusal("x.bin", content[start : start + HEAD_BYTES]) is None
