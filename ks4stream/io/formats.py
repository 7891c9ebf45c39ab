"""Formats that are not flat binaries: recognized by first bytes or name, with advice how to open them.

A flat file has no header, so any file can be read as one, and becomes noise. Three kinds of evidence count:

- *first bytes* that cannot be a coincidence. Samples may hold any bytes, and there would be no remedy for a flat file
  that is mistaken for another format. Therefore eight bytes must agree (one in 10¹⁹ for random ones), and if a format
  begins with fewer, `proof` must hold too: what follows them must make sense;
- *text*: a whole kilobyte of readable characters, of several kinds, with line breaks. Small samples have 0 or 255 in
  every other byte, which text never has;
- a *suffix* that is used for one thing only. Such a file may still be flat; then it is enough to rename it, and the
  message says so.
"""

from __future__ import annotations

import math
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from ks4stream.io.objects import is_remote, name_of

HEAD_BYTES = 4096  # of a file's beginning that are examined
_TEXT_BYTES = 1024  # of these that decide whether it is text
_MIN_TEXT_BYTES = 64  # shorter files are not judged
_MIN_CHARACTERS = 8  # different ones in a text: samples that hardly change are not text
_ENOUGH_BYTES = 8  # that agree, to need no further proof
_RANDOM_BITS = 7.5  # of entropy per byte: 4096 random bytes have 7.95, samples that use ten of their 16 bits 6
_FOLDERS_LOOKED_INTO = 200
_RESULTS, _PREPROCESSED_COPY = {"params.py", "spike_times.npy"}, "temp_wh.dat"  # the first in every folder for Phy

_NPY = re.compile(rb"\x93NUMPY[\x01\x02]\x00.{2,4}\{'descr'", re.DOTALL)


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes
    ----------
    what : str
        What it is.
    how : str
        How to open it; ``{path}`` and ``{folder}`` are filled in.
    suffixes : tuple of str
        Suffixes of its names, in lower case.
    magic : tuple of (int, bytes)
        Bytes at offsets, each of which is evidence.
    proof : callable, optional
        Takes the first bytes and returns whether a magic number of fewer than eight bytes is more than a coincidence.
    is_container : bool
        Whether other formats are built on it, so that a known suffix says more.
    """

    what: str
    how: str
    suffixes: tuple[str, ...] = ()
    magic: tuple[tuple[int, bytes], ...] = ()
    proof: Callable[[bytes], bool] | None = None
    is_container: bool = False

    def begins(self, head: bytes) -> bool:
        """Whether these are, beyond coincidence, the first bytes of such a file."""
        return any(
            head.startswith(magic, offset)
            and (len(magic) >= _ENOUGH_BYTES or (self.proof is not None and self.proof(head)))
            for offset, magic in self.magic
        )


def is_npy(head: bytes) -> bool:
    """Whether a file begins like one written by ``numpy.save``."""
    return _NPY.match(head) is not None


def is_hdf5(head: bytes) -> bool:
    """Whether a file is HDF5, but not one of MATLAB's, which hold transposed arrays."""
    return next((entry for entry in NOT_FLAT if entry.begins(head)), None) is HDF5


def refusal(path: str, head: bytes) -> str | None:
    """Return why a file cannot be read as a flat binary, and how to open it; None if it may be one.

    Parameters
    ----------
    path : str
        Its location.
    head : bytes
        Its first bytes, ``HEAD_BYTES`` if it has as many.
    """
    suffix = os.path.splitext(name_of(path))[1].lower()
    by_name = _OF_SUFFIX.get(suffix)
    found = next((entry for entry in NOT_FLAT if entry.begins(head)), None)
    if found is not None and by_name is not None and found.is_container:
        found = by_name  # an .nwb is an HDF5 file, and an .npz a ZIP archive
    if found is not None:
        return _message(path, found, "by its first bytes")
    if is_text(head):
        return _message(path, by_name or TEXT, "its first bytes are readable")  # not shown, as they may be secret
    if by_name is not None:
        return _message(path, by_name, f"by its suffix {suffix}") + (
            " If it is a flat binary after all, rename it to end in .bin."
        )
    return None


def folder_refusal(folder: str) -> str:
    """Return why a folder cannot be read as a recording, and which of its files can."""
    names = []
    for where, below, here in islice(os.walk(folder), _FOLDERS_LOOKED_INTO):
        if _RESULTS.issubset(here):  # perhaps beside the recording
            below.clear()  # what a sort wrote is no recording, such as the arrays of sorting.zarr
            here = [name for name in here if name != _PREPROCESSED_COPY]
        names += [os.path.relpath(os.path.join(where, name), folder) for name in sorted(here)]
    for ending, what, how in _FOLDERS:
        if found := [name for name in names if f"{os.sep}{name}".endswith(ending.replace("/", os.sep))]:
            files = ", ".join(sorted(found)[:4]) + (", …" if len(found) > 4 else "")
            return f"{folder} is a folder ({what}); {_filled(how, folder, folder).replace('{files}', files)}."
    if _RESULTS.issubset(names):
        return f"{folder} is a folder (with the results of a sort); give the recording that was sorted."
    return f"{folder} is a folder, but not a Zarr array or group; give the file that holds the samples."


def is_text(head: bytes) -> bool:
    """Whether a file's first kilobyte is certainly text."""
    sample = head[:_TEXT_BYTES]
    try:
        text = sample.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(sample) - 3 or len(head) <= _TEXT_BYTES:  # otherwise a truncated character
            return False
        text = sample[: error.start].decode("utf-8-sig")
    return (
        len(sample) >= _MIN_TEXT_BYTES
        and all(character.isprintable() or character in "\t\r\n\f" for character in text)
        and sum(map(str.isascii, text)) > 0.9 * len(text)
        and len(set(text)) >= _MIN_CHARACTERS
        and ("\n" in text or "\r" in text or text[0] in "{[<")
    )


def _message(path: str, found: Format, evidence: str) -> str:
    shown = name_of(path) if is_remote(path) else path
    how = _filled(found.how, shown, os.path.dirname(shown) or ".")
    return f"{path} cannot be read as samples: it is {found.what} ({evidence}); {how}."


def _filled(how: str, path: str, folder: str) -> str:
    return how.replace("{path}", repr(path)).replace("{folder}", repr(folder))


# -- proofs ------------------------------------------------------------------------------------------------------


def _is_gzip(head: bytes) -> bool:
    """The rest decompresses, and is as random as compressed data or ends with the right checksum."""
    stream = zlib.decompressobj(wbits=31)
    try:
        stream.decompress(head)
    except zlib.error:
        return False
    return stream.eof or _is_random(head)


def _is_zip(head: bytes) -> bool:
    """A known version and compression method, and a name of readable characters."""
    if len(head) < 32:
        return False
    version, _, method = struct.unpack_from("<3H", head, 4)
    name = head[30 : 30 + int.from_bytes(head[26:28], "little")].decode("utf-8", errors="replace")
    is_name = name != "" and name.isascii() and name.isprintable()
    return 10 <= version <= 63 and method in (0, 8, 9, 12, 14, 93, 95) and is_name


def _is_zstd(head: bytes) -> bool:
    """No reserved bit set, a first block of valid type and size, and a rest that is as random as compressed data."""
    if not _is_random(head):
        return False
    flags = head[4]
    one_segment = flags >> 5 & 1
    at = 6 - one_segment + (0, 1, 2, 4)[flags & 3] + (one_segment, 2, 4, 8)[flags >> 6]
    block = int.from_bytes(head[at : at + 3], "little")
    return not flags & 8 and block >> 1 & 3 != 3 and 0 < block >> 3 <= 1 << 17


def _is_random(head: bytes) -> bool:
    """Whether bytes are as random as compressed data; the upper bytes of 16-bit samples are not."""
    shares = [count / len(head) for count in Counter(head).values()]
    return len(head) == HEAD_BYTES and -sum(share * math.log2(share) for share in shares) >= _RANDOM_BITS


def _is_intan(head: bytes) -> bool:
    """A valid version, and a valid sampling rate at its position."""
    if len(head) < 12:
        return False
    major, minor, rate_hz = struct.unpack_from("<2hf", head, 4)
    return 1 <= major <= 20 and 0 <= minor <= 20 and 100 <= rate_hz <= 100_000


def _is_plexon(head: bytes) -> bool:
    """A valid version, and a comment of text and zeros."""
    version, comment = int.from_bytes(head[4:8], "little"), head[8:136]
    return len(head) > 136 and 100 <= version <= 120 and comment.isascii()


def _is_spikegadgets(head: bytes) -> bool:
    return is_text(head) and b"<Configuration" in head


# -- the table ---------------------------------------------------------------------------------------------------


def _spikeinterface(reader: str, target: str = "{path}") -> str:
    return (
        f"read it with SpikeInterface and save it as Zarr, which can be sorted: spikeinterface.extractors.{reader}"
        f"({target}).save(folder='recording.zarr', format='zarr')"
    )


_DATASET = "open it with h5py and pass its dataset of shape (time, channel), h5py.File({path})['NAME']"
_DECOMPRESS = "decompress it first, and give the resulting file"
_SAMPLES = "give the file that holds the samples"

# The first match counts: containers and text, on which other formats are built, come last.
NOT_FLAT = (
    # Files of acquisition systems
    Format(
        "a Blackrock or Ripple file",
        _spikeinterface("read_blackrock"),
        (".ns1", ".ns2", ".ns3", ".ns4", ".ns5", ".ns6", ".nf3", ".nf6"),
        ((0, b"NEURALSG"), (0, b"NEURALCD"), (0, b"NEUCDFLT"), (0, b"BRSMPGRP")),
    ),
    Format(
        "a file of events and snippets",
        "give the recording next to it (.ns5, .ns6, .ncs)",
        (".nev", ".nse", ".ntt"),
        ((0, b"NEURALEV"), (0, b"BREVENTS")),
    ),
    Format(
        "a Neuralynx file (one per channel) with a header and time stamps",
        _spikeinterface("read_neuralynx", "{folder}"),
        (".ncs", ".nrd"),
        ((0, b"######## Neuralynx"),),
    ),
    Format(
        "an Intan file with a header and samples in blocks",
        _spikeinterface("read_intan"),
        (".rhd", ".rhs"),
        ((0, b"\x02\x27\x91\xc6"), (0, b"\xac\x27\x91\xd6")),
        _is_intan,
    ),
    Format(
        "an Open Ephys file in the older format (one per channel), with a header",
        _spikeinterface("read_openephys", "{folder}"),
        (".continuous", ".openephys"),
        ((0, b"header.format = 'Open Ephys"),),
    ),
    Format(
        "a description of an Open Ephys recording",
        "give the continuous.dat of the stream to sort, with n_chan (its num_channels) and fs (its sample_rate)",
        (".oebin",),
    ),
    Format("a Plexon file", _spikeinterface("read_plexon"), (".plx",), ((0, b"PLEX"),), _is_plexon),
    Format("a Plexon file", _spikeinterface("read_plexon2"), (".pl2",)),
    Format("a NeuroExplorer file", _spikeinterface("read_neuroexplorer"), (".nex", ".nex5")),
    Format("a Spike2 file", _spikeinterface("read_ced"), (".smr", ".smrx")),
    Format(
        "one of the files of a Tucker-Davis block",
        _spikeinterface("read_tdt", "{folder}"),
        (".sev", ".tev", ".tsq", ".tbk"),
    ),
    Format("an Alpha Omega file", _spikeinterface("read_alphaomega", "{folder}"), (".mpx", ".lsx")),
    Format(
        "a SpikeGadgets file with settings before the samples",
        _spikeinterface("read_spikegadgets"),
        (),
        ((0, b"<?xml"),),
        _is_spikegadgets,
    ),
    Format(
        "a Multi Channel Systems file with a header",
        _spikeinterface("read_mcsraw"),
        (),
        ((0, b"MC_DataTool binary conversion"),),
    ),
    Format(
        "a Multi Channel Systems file",
        "export it as HDF5 (with the vendor's Data Manager), and " + _spikeinterface("read_mcsh5", "'FILE.h5'"),
        (".mcd", ".msrd"),
    ),
    Format(
        "a NeuroNexus Allego file of float32 samples",
        "rename it to end in .dat, and give dtype='float32', n_chan and fs from its .xdat.json; or "
        + _spikeinterface("read_neuronexus"),
        (".xdat",),
    ),
    Format("an Axon (pCLAMP) file", _spikeinterface("read_axon"), (".abf",)),
    Format(
        "an EDF or BDF file",
        _spikeinterface("read_edf"),
        (".edf", ".bdf"),
        ((0, b"\xffBIOSEMI"), (192, b"EDF+C   "), (192, b"EDF+D   ")),
    ),
    Format("an MDA file, with a header", _spikeinterface("read_mda_recording", "{folder}"), (".mda",)),
    Format(
        "a BrainVision header",
        "give the file of samples that it names (.eeg or .dat)",
        (".vhdr", ".vmrk"),
        ((0, b"Brain Vision Data Exchange"), (0, b"BrainVision Data Exchange")),
    ),
    # Placeholders for a file
    Format(
        "a pointer of Git LFS, not the file itself",
        "fetch it: git lfs pull",
        (),
        ((0, b"version https://git-lfs.github.com/spec/"),),
    ),
    Format(
        "a pointer of git-annex, not the file itself",
        "fetch it: git annex get, or datalad get",
        (),
        ((0, b"/annex/objects/"),),
    ),
    Format(
        "a web page, not the file itself",
        "download it again (it may need a login)",
        (),
        ((0, b"<!DOCTYPE html"), (0, b"<!doctype html"), (0, b"<html"), (0, b"<HTML")),
        is_text,
    ),
    # Files of analysis programs
    Format("an NWB file", f"{_spikeinterface('read_nwb_recording')}; or {_DATASET}", (".nwb",)),
    Format(
        "a MATLAB file",
        "load it (scipy.io.loadmat; from version 7.3 h5py) and pass its array, of shape (time, channel)",
        (".mat",),
        ((0, b"MATLAB 5.0 MAT-file"), (0, b"MATLAB 7.3 MAT-file")),
    ),
    Format(
        "an archive of NumPy arrays",
        "load it and pass its array, numpy.load({path})['NAME']; or save that as .npy",
        (".npz",),
    ),
    Format("a Python pickle", "load it and pass its array, of shape (time, channel)", (".pkl", ".pickle")),
    Format("an SQLite database", _SAMPLES, (".sqlite", ".sqlite3"), ((0, b"SQLite format 3\x00"),)),
    Format(
        "a table of Parquet or Arrow",
        "load it and pass its values, of shape (time, channel)",
        (".parquet", ".feather"),
        ((0, b"ARROW1\x00\x00"),),
    ),
    Format("a WAVE file", "read it (scipy.io.wavfile.read) and pass its array", (".wav",), ((8, b"WAVEfmt "),)),
    # Compressed
    Format("compressed by gzip", f"{_DECOMPRESS} (gunzip)", (".gz", ".tgz"), ((0, b"\x1f\x8b\x08"),), _is_gzip),
    Format("compressed by Zstandard", f"{_DECOMPRESS} (unzstd)", (".zst",), ((0, b"\x28\xb5\x2f\xfd"),), _is_zstd),
    Format(
        "compressed by xz",
        f"{_DECOMPRESS} (unxz)",
        (".xz",),
        tuple((0, b"\xfd7zXZ\x00\x00" + bytes([check])) for check in (0, 1, 4, 10)),
    ),
    Format(
        "compressed by bzip2",
        f"{_DECOMPRESS} (bunzip2)",
        (".bz2",),
        tuple((0, b"BZh%d1AY&SY" % level) for level in range(1, 10)),
    ),
    Format("compressed by LZ4", f"{_DECOMPRESS} (unlz4)", (".lz4",)),
    Format("a tar archive", "unpack it first", (".tar",), ((257, b"ustar\x0000"), (257, b"ustar  \x00"))),
    Format("a 7-Zip archive", "unpack it first", (".7z",), ((0, b"7z\xbc\xaf\x27\x1c\x00\x04"),)),
    Format("a RAR archive", "unpack it first", (".rar",), ((0, b"Rar!\x1a\x07\x01\x00"),)),
    # Metadata
    Format("metadata", "pass the .bin file next to it", (".meta",)),
    Format("the index of a .cbin file", "pass the .cbin file next to it", (".ch",)),
    Format("a probe", "pass it as probe", (".prb", ".imro")),
    Format("settings or a probe", f"pass a probe as probe, and {_SAMPLES}", (".json",)),
    Format("XML", _SAMPLES, (".xml",)),
    # Containers
    Format(
        "an HDF5 file",
        f"{_DATASET}; or, if it is an NWB file, {_spikeinterface('read_nwb_recording')}",
        (".h5", ".hdf5", ".hdf", ".kwd", ".kwik", ".brw", ".bxr", ".nix"),
        tuple((offset, b"\x89HDF\r\n\x1a\n") for offset in (0, 512, 1024, 2048)),
        is_container=True,
    ),
    Format(
        "a ZIP archive",
        "unpack it, and give the file that holds the samples",
        (".zip",),
        ((0, b"PK\x03\x04"),),
        _is_zip,
        is_container=True,
    ),
    Format(
        "text",
        "numbers can be loaded (numpy.loadtxt) and passed as an array of shape (time, channel)",
        (".csv", ".tsv", ".txt", ".log", ".ini", ".yaml", ".yml", ".toml"),
    ),
)
TEXT = NOT_FLAT[-1]
HDF5 = next(entry for entry in NOT_FLAT if ".hdf5" in entry.suffixes)
_OF_SUFFIX = {suffix: entry for entry in NOT_FLAT for suffix in entry.suffixes}

# The end of a file name within a folder (a leading slash: the whole name), what the folder is, what to give instead.
_FOLDERS = (
    ("/.zmetadata", "a Zarr group whose .zgroup or zarr.json is missing", "copy it again, completely"),
    (
        "/structure.oebin",
        "an Open Ephys recording",
        "give the continuous.dat of the stream to sort, with n_chan and fs from structure.oebin; or "
        + _spikeinterface("read_openephys"),
    ),
    (".continuous", "an Open Ephys recording in the older format", _spikeinterface("read_openephys")),
    (".ap.bin", "a SpikeGLX run", "give its .ap.bin files in order of time ({files})"),
    (".cbin", "a recording compressed by mtscomp", "give its .cbin files in order of time ({files})"),
    (
        "/binary.json",
        "a recording saved by SpikeInterface",
        "give its traces_cached_seg0.raw, one file for each segment, with n_chan, fs and dtype from binary.json",
    ),
    ("/info.rhd", "an Intan recording in several files", "give its amplifier.dat, with n_chan and fs"),
    (".ncs", "a Neuralynx recording", _spikeinterface("read_neuralynx")),
    (".tsq", "a Tucker-Davis block", _spikeinterface("read_tdt")),
    (".mda", "a MountainSort recording", _spikeinterface("read_mda_recording")),
    ("/.zarray", "containing Zarr arrays", "give the array's own path ({files}, without .zarray)"),
    ("/zarr.json", "containing Zarr arrays", "give the array's own path ({files}, without zarr.json)"),
    (".bin", "containing flat binaries", "give the files themselves ({files})"),
    (".dat", "containing flat binaries", "give the files themselves ({files})"),
)
