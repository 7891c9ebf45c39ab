"""Sort one recording from disk and from an S3 server: same result, same time, every byte fetched once?

    python benchmarks/object_store.py --out object_store.json                      # 10 minutes, Ceph's radosgw
    python benchmarks/object_store.py --minutes 0.5 --server moto --repeats 1      # a quick look

A simulated recording of 32 channels with drift is stored as Zarr, on disk and in a bucket. Both are sorted in turns,
straight from the server, and wall times compared (median of the repeats). Then it is sorted once more through a proxy
that counts bytes, and once through one that lets 5 % of all reads fail: by status 503, by reset and by silence. All
results must be identical. `--layout flat` stores a flat binary instead, `sharded` Zarr 3 with shards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import obstore
import outcome
import zarr
from faulty_proxy import faulty_proxy
from numcodecs import Blosc
from obstore.store import S3Store
from s3_server import Server, serve

from ks4stream import Recording, Settings, Sorting, open_recording, simulate, sort
from ks4stream.engine.cluster import local_client

RATE = 30_000
BUCKET, NAME = "recordings", "drifting #1"
PROBE = simulate.staggered_probe(32)
FAILING = 0.05
LAYOUTS = ("zarr", "sharded", "flat")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all, print, and fail if results differ or too much is fetched."""
    options = _options(arguments)
    found: dict[str, Any] = {"machine": outcome.machine(), "options": vars(options)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        near = make(folder, options)
        with serve(options.server, folder / "server") as server:
            found |= measure(near, server, options)
    text = json.dumps(found, indent=1, default=str)
    print(text)
    if options.out:
        options.out.write_text(text)
    if not found["identical"] or found["fetched_over_stored"] > 1.1:
        sys.exit(1)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--server", choices=("radosgw", "moto"), default="radosgw")
    parser.add_argument("--layout", choices=LAYOUTS, default="zarr")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each kind; 0 for none")
    parser.add_argument("--folder", type=Path, help="keeps recording and server between calls")
    parser.add_argument("--out", type=Path, help="JSON with all figures")
    return parser.parse_args(arguments)


def make(folder: Path, options: argparse.Namespace) -> Path:
    """Simulate the recording, or find it where an earlier call has left it."""
    path = folder / f"{options.layout}-{options.minutes:g}" / NAME
    if path.exists():
        return path
    truth = simulate.simulate(PROBE, options.minutes * 60, seed=11, n_units=30, drift="rigid", drift_range_um=20.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name("draft")
    if options.layout == "flat":
        truth.write_binary(draft)
    else:
        write_zarr(draft, truth, options.layout)
    return draft.rename(path)


def write_zarr(path: Path, truth: simulate.SimulatedRecording, layout: str) -> None:
    """A second per chunk, compressed as SpikeInterface does; shards of ten seconds are of version 3."""
    n_samples, n_channels = truth.traces.shape
    if layout == "sharded":
        from zarr.codecs import BloscCodec

        array: Any = zarr.create_array(
            str(path),
            shape=(n_samples, n_channels),
            dtype="int16",
            chunks=(RATE, n_channels),
            shards=(10 * RATE, n_channels),
            compressors=BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle"),
        )
    else:
        version = {"zarr_format": 2} if int(zarr.__version__.partition(".")[0]) >= 3 else {}
        array = zarr.open_array(
            str(path),
            mode="w",
            shape=(n_samples, n_channels),
            dtype="int16",
            chunks=(RATE, n_channels),
            compressor=Blosc("zstd", 5, Blosc.BITSHUFFLE),
            **version,
        )
    for start in range(0, n_samples, 10 * RATE):
        stop = min(start + 10 * RATE, n_samples)
        array[start:stop] = truth.read(start, stop)


def measure(near: Path, server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is said of one recording."""
    os.environ |= server.environment()
    stored_bytes = upload(near)
    url = f"s3://{BUCKET}/{NAME}"
    seconds: dict[str, list[float]] = {"near": [], "far": []}
    results = set()
    for _ in range(options.repeats):
        for kind, place in (("near", str(near)), ("far", url)):
            sorting, wall_s = timed_sort(place, options.workers)
            seconds[kind].append(wall_s)
            results.add(digest(sorting))
    counts = {}
    for kind, share in (("counted", 0.0), ("failing", FAILING)):
        with faulty_proxy(server.url, share=share) as proxy:
            os.environ |= server.environment(proxy.url)
            sorting, wall_s = timed_sort(url, options.workers)
            counts[kind] = {
                "fetched_bytes": proxy.sent_bytes.total(),
                "requests": proxy.requests.total(),
                "faults": dict(proxy.faults),
                "wall_s": wall_s,
            }
        results.add(digest(sorting))
    if not options.repeats:
        results.add(digest(timed_sort(str(near), options.workers)[0]))
    return {
        "stored_bytes": stored_bytes,
        "fetched_over_stored": counts["counted"]["fetched_bytes"] / stored_bytes,
        "wall_s": seconds,
        "wall_ratio": median(seconds["far"]) / median(seconds["near"]) if options.repeats else None,
        "runs": counts,
        "n_spikes": sorting.n_spikes,
        "drift_um": float(np.ptp(sorting.drift.shift_um)) if sorting.drift is not None else 0.0,
        "identical": len(results) == 1,
    }


def upload(path: Path) -> int:
    """Store a file or a folder in the bucket; returns its size in bytes."""
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name="us-east-1")
    client.create_bucket(Bucket=BUCKET)
    store = S3Store(BUCKET, client_options={"allow_http": True})
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        obstore.put(store, "/".join((NAME, *file.relative_to(path).parts)), file.read_bytes())
    return sum(file.stat().st_size for file in files)


def timed_sort(place: str, n_workers: int) -> tuple[Sorting, float]:
    """Sort, in a cluster of its own, and tell the seconds from opening to the last unit."""
    with local_client(n_workers=n_workers) as client, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        began = time.perf_counter()
        recording: Recording = open_recording(place, n_chan=PROBE.n_channels, fs=RATE, probe=PROBE)
        sorting = sort(recording, Settings(), client=client)
        return sorting, time.perf_counter() - began


def digest(sorting: Sorting) -> str:
    """Hash of every array of a result."""
    state = hashlib.sha256()
    for spec in fields(Sorting):
        if "dims" in spec.metadata:
            state.update(np.ascontiguousarray(getattr(sorting, spec.name)).tobytes())
    return state.hexdigest()


if __name__ == "__main__":
    main()
