"""Fixtures shared by all tests: a small, consistent sorting made by hand, and a real S3 server."""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ks4stream.blocks import Tiling
from ks4stream.io import objects
from ks4stream.probe import Probe
from ks4stream.results import Drift, PeakSample, Sorting, Waveforms, Whitening
from ks4stream.settings import Settings

MakeSorting = Callable[..., Sorting]
BUCKET = "recordings"
SECRET = "not-for-anybody-to-see"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a bucket is slow: the server takes seconds to start and tens of milliseconds to answer."""
    for item in items:
        if "object_store" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@dataclass(frozen=True)
class ObjectStore:
    """A bucket on an S3 server, behind a proxy that counts and disturbs what is read."""

    proxy: Any
    client: Any
    secret: str = SECRET

    def put(self, source: Path | bytes, key: str) -> str:
        """Store bytes, a file, or a folder with all that is in it; returns the URL."""
        if isinstance(source, Path) and source.is_dir():
            for path in sorted(path for path in source.rglob("*") if path.is_file()):
                self.put(path, f"{key}/{path.relative_to(source).as_posix()}")
        else:
            body = source.read_bytes() if isinstance(source, Path) else source
            self.client.put_object(Bucket=BUCKET, Key=key, Body=body, ACL="public-read")
        return f"s3://{BUCKET}/{key}"


@pytest.fixture(scope="session")
def _s3() -> Iterator[ObjectStore]:
    pytest.importorskip("obstore")
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto.moto_server.werkzeug_app")
    from werkzeug.serving import make_server  # comes with moto

    path = Path(__file__).parents[1] / "benchmarks" / "faulty_proxy.py"
    spec = importlib.util.spec_from_file_location("faulty_proxy", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request
    # Without moto's dispatcher, which looks through the folder of all its services at every request.
    server = make_server("127.0.0.1", 0, moto.create_backend_app("s3"), threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.port}"
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="someone", aws_secret_access_key=SECRET
    )
    client.create_bucket(Bucket=BUCKET)
    try:
        with module.faulty_proxy(url) as proxy:
            yield ObjectStore(proxy, client)
    finally:
        client.close()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def object_store(_s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """An S3 server that works, and credentials for it in the environment."""
    for name, value in {
        "AWS_ENDPOINT_URL": _s3.proxy.url,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nowhere",
        "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
    }.items():
        monkeypatch.setenv(name, value)
    _s3.proxy.reset_counts()
    yield _s3
    _s3.proxy.share, _s3.proxy.heeds_conditions = 0.0, True


@pytest.fixture(scope="session", autouse=True)
def _no_rates() -> Iterator[None]:
    """How fast tests sort is not kept among what real sorts on this machine measured, nor for other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KS4STREAM_CACHE", "off")
        yield


@pytest.fixture(autouse=True)
def _stores_are_opened_again() -> Iterator[None]:
    """No test is handed a connection that another opened, perhaps with less patience."""
    yield
    objects._opened_store.cache_clear()


@pytest.fixture
def make_sorting() -> MakeSorting:
    """A function that makes a small sorting; keywords replace fields of the result."""
    return small_sorting


def small_sorting(
    *, n_spikes: int = 400, n_units: int = 4, n_channels: int = 12, n_slots: int = 5, n_pcs: int = 3, **changes: Any
) -> Sorting:
    """Spikes of `n_units` units on two columns of contacts; the last unit was found by two templates.

    Templates on the first channel have one channel fewer than slots, so their lists end with −1.
    """
    rng = np.random.default_rng([n_spikes, n_units, n_channels])
    settings = changes.pop("settings", Settings(nt=21, n_pcs=n_pcs, nearest_chans=n_slots))
    probe = Probe(
        chan_map=np.arange(n_channels)[::-1].copy(),
        x_um=np.tile([0.0, 32.0], n_channels)[:n_channels],
        y_um=20.0 * (np.arange(n_channels) // 2),
        shank=np.zeros(n_channels, np.int64),
        name="two columns",
    )
    template_channels, unit_of_template = _templates(probe, n_units, n_slots)
    unit_features = _unit_features(rng, template_channels[:n_units], n_channels, n_pcs)
    template = np.sort(rng.integers(0, max(len(unit_of_template), 1), n_spikes)).astype(np.int32)
    rng.shuffle(template)
    unit = unit_of_template[template] if n_units else template
    slots = template_channels[template]
    features = unit_features[unit[:, None], slots] + rng.normal(0, 0.1, (n_spikes, n_slots, n_pcs))
    features[slots < 0] = 0
    n_samples = changes.get("n_samples", 330_000)
    tiling = Tiling.by_settings(settings, n_samples=n_samples, sampling_rate_hz=30_000.0)
    n_batches = len(tiling)
    values: dict[str, Any] = {
        "sample": np.sort(rng.integers(0, 300_000, n_spikes)),
        "unit": unit,
        "template": template,
        "score": rng.uniform(8, 60, n_spikes),
        "features": features,
        "kept": rng.uniform(size=n_spikes) > 0.05,
        "x_um": rng.uniform(0, 32, n_spikes),
        "y_um": probe.y_um[slots[:, 0]] + rng.normal(0, 3, n_spikes) if n_units else np.zeros(0),
        "template_channels": template_channels,
        "unit_features": unit_features,
        "similarity": np.eye(n_units),
        "refractory": np.arange(n_units) % 2 == 0,
        "contamination": np.linspace(0.01, 0.9, n_units),
        "sampling_rate_hz": 30_000.0,
        "settings": settings,
        "probe": probe,
        "whitening": Whitening(np.eye(n_channels) * 0.1 + 0.01, np.zeros(0), n_batches),
        "waveforms": Waveforms(np.linalg.qr(rng.normal(size=(21, n_pcs)))[0].T, rng.normal(size=(6, 21)), 1234, 6.0),
        "drift": Drift(rng.normal(0, 3, (n_batches, 2)).cumsum(axis=0), [20.0, 80.0]),
        "peaks": PeakSample(
            np.sort(rng.integers(0, 300_000, 500)), rng.uniform(0, 100, 500), 9 + rng.exponential(10, 500)
        ),
        "artifacts": np.array([[1000, 1200], [50_000, 50_100]]),
        "n_samples": n_samples,
        "tiling": tiling,
        "n_chan_file": n_channels + 1,
        "seconds": {"whitening": 0.5, "drift": 2.0},
        "warnings": ("a warning",),
    }
    return Sorting(**(values | changes))


def _templates(probe: Probe, n_units: int, n_slots: int) -> tuple[Any, Any]:
    """Nearest channels of each learned template, and the unit each ended in; one template more than units."""
    n_templates = n_units + (n_units > 0)
    at = (np.arange(n_templates) * 3) % probe.n_channels
    distance = np.hypot(probe.x_um - probe.x_um[at, None], probe.y_um - probe.y_um[at, None])
    channels = np.full((n_templates, n_slots), -1, np.int64)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :n_slots]
    channels[:, : nearest.shape[1]] = nearest
    channels[at == 0, -1:] = -1
    return channels, np.minimum(np.arange(n_templates), n_units - 1).astype(np.int32)


def _unit_features(rng: np.random.Generator, channels: Any, n_channels: int, n_pcs: int) -> Any:
    features = np.zeros((len(channels), n_channels, n_pcs))
    for unit, own in enumerate(channels):
        own = own[own >= 0]
        features[unit, own] = rng.normal(size=n_pcs) * (20.0 / (1 + np.arange(len(own))))[:, None]
    return features
