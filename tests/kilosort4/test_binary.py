"""Kilosort4's readers: the same batches, as stored and as a sort sees them."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ks4stream import simulate
from ks4stream.errors import OpsError, RecordingError, SettingsError
from ks4stream.io.kilosort_ops import highpass_impulse
from ks4stream.io.recordings import open_recording
from ks4stream.kilosort4.binary import BinaryFiltered, BinaryRWFile
from ks4stream.results import Drift, Whitening
from ks4stream.settings import Settings
from ks4stream.sorter import prepare

CPU = torch.device("cpu")
PROBE = simulate.staggered_probe(16)
RATE = 30_000
OPS: dict[str, Any] = {
    "probe": {"chanMap": PROBE.chan_map, "xc": PROBE.x_um, "yc": PROBE.y_um, "kcoords": PROBE.shank},
    "yblk": np.array([70.0]),
    "sig_interp": 20,
}


@pytest.fixture(scope="module")
def samples() -> np.ndarray:
    return simulate.simulate(PROBE, 1.0, seed=1, n_units=3).read(0, 25_000)


@pytest.fixture(scope="module")
def path(samples: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("data") / "recording.bin"
    samples.tofile(found)
    return found


def raw(path: Any, **options: Any) -> BinaryRWFile:
    return BinaryRWFile(path, 16, NT=6000, device=CPU, **options)


def filtered(path: Any, **options: Any) -> BinaryFiltered:
    return BinaryFiltered(path, 16, NT=6000, device=CPU, **options)


# -- as stored -------------------------------------------------------------------------------------------


def test_shape_and_batches(path: Path, samples: np.ndarray) -> None:
    with raw(path) as bfile:
        assert (bfile.shape, bfile.size, bfile.n_samples, len(bfile)) == ((25_000, 16), 400_000, 25_000, 25_000)
        assert (bfile.n_batches, bfile.imin, bfile.imax, bfile.dtype) == (5, 0, 25_000, "int16")
        assert (bfile.n_chan_bin, bfile.fs, bfile.NT, bfile.nt, bfile.nt0min) == (16, RATE, 6000, 61, 20)
        batches = [bfile.padded_batch_to_torch(index, return_inds=True) for index in range(5)]
    assert all(batch.shape == (16, 6122) and batch.dtype == torch.float32 for batch, _ in batches)
    assert [inds for _, inds in batches] == [
        [-61, 6061],
        [5939, 12_061],
        [11_939, 18_061],
        [17_939, 24_061],
        [23_939, 25_061],
    ]
    padded = np.pad(samples, ((61, 6000), (0, 0)), mode="edge").T
    for index, (batch, _) in enumerate(batches):
        assert np.array_equal(batch.numpy(), padded[:, index * 6000 :][:, :6122])
    assert torch.equal(raw(path).padded_batch_to_torch(1), batches[1][0])


@pytest.mark.parametrize(
    "key",
    [
        slice(3, 9),
        slice(None, 20, 3),
        slice(-4, None),
        slice(9, 3, -2),
        slice(5, 5),
        7,
        -1,
        (slice(0, 5), 2),
        (slice(0, 5), slice(1, 9, 2)),
        (slice(0, 5), [3, 1]),
        (4, slice(2)),
        (Ellipsis, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("crop", [{}, {"tmin": 0.1, "tmax": 0.6}])
def test_slices_are_an_arrays(path: Path, samples: np.ndarray, key: Any, crop: dict[str, float]) -> None:
    sorted_samples = samples[3000:18_000] if crop else samples
    found = raw(path, **crop)[key]
    assert found.dtype == np.int16 and np.array_equal(found, sorted_samples[key])


def test_a_crop(path: Path, samples: np.ndarray) -> None:
    bfile = raw(path, tmin=0.1, tmax=0.5)
    assert (bfile.n_batches, bfile.imin, bfile.imax, bfile.shape) == (2, 3000, 15_000, (12_000, 16))
    batch, inds = bfile.padded_batch_to_torch(0, return_inds=True)
    assert inds == [2939, 9061]
    assert torch.equal(batch[:, :61], batch[:, 61:62].expand(-1, 61))  # nothing before tmin is seen
    assert np.array_equal(batch[:, 61:].numpy(), samples[3000:9061].T)


def test_every_second_batch(path: Path) -> None:
    bfile = raw(path, batch_downsampling=2)
    assert bfile.n_batches == 2
    assert bfile.padded_batch_to_torch(1, return_inds=True)[1] == [11_939, 18_061]


def test_a_last_batch_of_less_than_a_waveform_is_left_out(samples: np.ndarray) -> None:
    assert raw(None, file_object=samples[:24_060]).n_batches == 4
    assert raw(None, file_object=samples[:24_060]).imax == 24_000
    assert raw(None, file_object=samples[:24_061]).n_batches == 5


class Lazy:
    """Like an array, but not one: only slices."""

    def __init__(self, samples: np.ndarray) -> None:
        self._samples, self.shape, self.dtype = samples, samples.shape, samples.dtype

    def __getitem__(self, key: Any) -> Any:
        assert all(isinstance(part, slice) for part in (key if isinstance(key, tuple) else (key,)))
        return self._samples[key]


def test_types_scale_and_shift(path: Path, samples: np.ndarray, tmp_path: Path) -> None:
    expected = raw(path).padded_batch_to_torch(1)
    for dtype in ("uint16", "int32", "float32"):
        other = (samples.astype(np.int32) + 2**15 * (dtype == "uint16")).astype(dtype)
        other.tofile(tmp_path / f"{dtype}.bin")
        bfile = raw(tmp_path / f"{dtype}.bin", dtype=dtype)
        assert bfile.dtype == dtype and torch.equal(bfile.padded_batch_to_torch(1), expected)
        assert np.array_equal(bfile[5:9], samples[5:9])
        assert torch.equal(raw("", file_object=Lazy(other)).padded_batch_to_torch(1), expected)
    changed = raw(path, scale=0.5, shift=3)
    assert torch.equal(changed.padded_batch_to_torch(1), expected * 0.5 + 3)
    assert changed[5:9].dtype == np.float32 and np.array_equal(changed[5:9], samples[5:9] * 0.5 + 3)


def test_files_are_joined(path: Path) -> None:
    with pytest.warns(UserWarning, match="given more than once"):
        assert raw([path, path]).n_samples == 50_000


def test_what_cannot_be_read(path: Path, samples: np.ndarray) -> None:
    bfile = raw(path)
    with pytest.raises(RecordingError, match="only read"):
        raw(path, write=True)
    with pytest.raises(RecordingError, match="only read"):
        bfile[0:3] = 0
    for batch in (-1, 5):
        with pytest.raises(IndexError, match=f"no batch {batch}; .* has 5"):
            bfile.padded_batch_to_torch(batch)
    with pytest.raises(RecordingError, match="Nothing to read"):
        raw("")
    with pytest.raises(RecordingError, match="nowhere"):
        raw("nowhere.bin")
    with pytest.raises(RecordingError, match="Correct n_chan"):
        raw(None, file_object=samples[:, :3])
    with pytest.raises(SettingsError, match="not a valid device"):
        BinaryRWFile(path, 16, device="tpu")


# -- as a sort sees them -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def matrix() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, (16, 16)).astype(np.float32)


SETTINGS = Settings(batch_size=6000)


def tiles_of(
    path: Path, settings: Settings = SETTINGS, matrix: Any = None, shift_um: Any = None, dead: Any = ()
) -> Any:
    recording = open_recording(path, n_chan=16, fs=RATE, probe=PROBE)
    tiles = replace(prepare(recording, settings), dead=np.array(dead, np.int64))
    if matrix is not None:
        tiles = tiles.with_whitening(Whitening(matrix, dead))
    return tiles if shift_um is None else tiles.with_drift(Drift(shift_um, [70.0]), settings)


def batches(bfile: BinaryFiltered, **options: Any) -> list[torch.Tensor]:
    return [bfile.padded_batch_to_torch(index, **options) for index in range(bfile.n_batches)]


def assert_all_close(found: list[torch.Tensor], expected: list[torch.Tensor], atol: float = 1e-3) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


SHIFT_UM = np.linspace(-15, 20, 5, dtype=np.float32)[:, None]


@pytest.mark.parametrize("shift_um", [None, SHIFT_UM])
def test_of_tiles_they_are_the_tiles_to_the_last_bit(path: Path, matrix: np.ndarray, shift_um: Any) -> None:
    tiles = tiles_of(path, matrix=matrix, shift_um=shift_um)
    bfile = BinaryFiltered.of(tiles, nt=41)
    assert bfile.recording is tiles.recording and bfile.tiles is tiles and bfile.n_batches == 5
    for tile, (batch, inds) in zip(tiles.tiling, batches(bfile, return_inds=True), strict=True):
        whole, _ = tiles.whitened(tile)
        assert torch.equal(batch, whole[:, tile.halo - 41 : tile.halo + 6041])
        assert inds == [tile.start - 41, tile.stop + 41]
    for (start, core), tile in zip(bfile.cores(), tiles.tiling, strict=True):
        assert start == tile.start and np.array_equal(core.T, tiles.whitened(tile)[0][:, tiles.core(tile)])
    assert torch.equal(bfile.whiten_mat, torch.from_numpy(matrix))  # type: ignore[arg-type]


def test_the_documented_constructor_gives_the_same(path: Path, matrix: np.ndarray) -> None:
    impulse = torch.from_numpy(highpass_impulse(SETTINGS, RATE))
    found = filtered(path, hp_filter=impulse, whiten_mat=torch.from_numpy(matrix), chan_map=np.arange(16))
    expected = BinaryFiltered.of(tiles_of(path, matrix=matrix))
    assert_all_close(batches(found), batches(expected))
    assert found.recording.probe is None and found.chan_map.tolist() == list(range(16))


def test_what_is_not_given_is_not_done(path: Path, matrix: np.ndarray) -> None:
    stored = raw(path).padded_batch_to_torch(1)
    plain = filtered(path, do_CAR=False).padded_batch_to_torch(1)
    assert_all_close([plain], [stored])
    turned = filtered(path, do_CAR=False, invert_sign=True, chan_map=[3, 1]).padded_batch_to_torch(1)
    assert_all_close([turned], [-stored[[3, 1]]])
    referenced = filtered(path).padded_batch_to_torch(1)
    assert_all_close([referenced], [torch.from_numpy(stored.numpy() - np.median(stored.numpy(), axis=0))])
    whitened = filtered(path, whiten_mat=matrix, artifact_threshold=None).padded_batch_to_torch(1)
    assert_all_close([whitened], [torch.from_numpy(matrix) @ referenced])
    scaled = filtered(path, do_CAR=False, scale=2, shift=1).padded_batch_to_torch(1)
    assert_all_close([scaled], [stored * 2 + 1])


def test_drift_is_corrected_where_an_ops_says_where_contacts_are(path: Path, matrix: np.ndarray) -> None:
    impulse = highpass_impulse(SETTINGS, RATE)
    bfile = filtered(path, hp_filter=impulse, whiten_mat=matrix, dshift=SHIFT_UM)
    assert_all_close(batches(bfile), batches(BinaryFiltered.of(tiles_of(path, matrix=matrix))))
    moved = batches(BinaryFiltered.of(tiles_of(path, matrix=matrix, shift_um=SHIFT_UM)))
    assert_all_close(batches(bfile, ops=OPS), moved)
    assert not torch.allclose(moved[0], bfile.padded_batch_to_torch(0), atol=0.1)
    stored = raw(path).padded_batch_to_torch(0)
    samples = raw(path)[:6061].T  # alone, as Kilosort4 filters them
    alone = bfile.filter(torch.from_numpy(np.ascontiguousarray(samples)), OPS, ibatch=0)
    assert_all_close([alone[:, :5000]], [moved[0][:, 61:5061]], atol=0.01)
    assert stored.shape == moved[0].shape


def test_preprocessing_is_skipped_on_demand(path: Path, matrix: np.ndarray) -> None:
    expected = filtered(path).padded_batch_to_torch(1)
    given = filtered(path, hp_filter=highpass_impulse(SETTINGS, RATE), whiten_mat=matrix, dshift=SHIFT_UM)
    assert_all_close([given.padded_batch_to_torch(1, OPS, skip_preproc=True)], [expected])
    of_tiles = BinaryFiltered.of(tiles_of(path, matrix=matrix, shift_um=SHIFT_UM))
    assert_all_close([of_tiles.padded_batch_to_torch(1, skip_preproc=True)], [expected])
    assert_all_close([given.filter(raw(path).padded_batch_to_torch(1), skip_preproc=True)], [expected])


@pytest.mark.parametrize("crop", [{}, {"tmin": 0.1, "tmax": 0.6}])
def test_slices_are_filtered_with_what_is_beside_them(path: Path, matrix: np.ndarray, crop: dict[str, float]) -> None:
    bfile = BinaryFiltered.of(tiles_of(path, SETTINGS.replace(**crop), matrix))
    whole = torch.cat([torch.from_numpy(core.T) for _, core in bfile.cores()], dim=1)
    for key in (slice(100, 900), slice(5900, 6100), slice(None, 50, 7), slice(-60, None)):
        assert_all_close([bfile[key]], [whole[:, key]])
        assert bfile[key].shape == whole[:, key].shape
    assert_all_close([bfile[100:200, [5, 2]]], [whole[[5, 2], 100:200]])
    assert_all_close([bfile[100:200, 3]], [whole[3, 100:200]])
    assert_all_close([bfile[77]], [whole[:, 77]])
    assert bfile[5:5].shape == (16, 0)


def test_slices_are_not_corrected_for_drift(path: Path, matrix: np.ndarray) -> None:
    still = BinaryFiltered.of(tiles_of(path, matrix=matrix))
    assert_all_close([BinaryFiltered.of(tiles_of(path, matrix=matrix, shift_um=SHIFT_UM))[50:90]], [still[50:90]])


def test_samples_that_are_handed_over_are_filtered(path: Path, matrix: np.ndarray) -> None:
    bfile = filtered(path, hp_filter=highpass_impulse(SETTINGS, RATE), whiten_mat=matrix, scale=2.0)
    found = bfile.filter(raw(path, scale=2.0).padded_batch_to_torch(1))
    expected = bfile.padded_batch_to_torch(1)
    assert found.shape == expected.shape
    assert_all_close([found[:, 600:-600]], [expected[:, 600:-600]], atol=0.01)


def test_artifacts_are_blanked(path: Path) -> None:
    threshold = float(filtered(path, do_CAR=False).padded_batch_to_torch(0).abs().max()) * 0.9
    batch = filtered(path, do_CAR=False, artifact_threshold=threshold).padded_batch_to_torch(0)
    assert batch.abs().max() < threshold and not torch.all(batch == 0)


@pytest.mark.parametrize("dead", [(), (4,)])
def test_channels_without_signal(path: Path, matrix: np.ndarray, dead: tuple[int, ...]) -> None:
    matrix = matrix.copy()
    matrix[list(dead)] = 0
    found = filtered(path, hp_filter=highpass_impulse(SETTINGS, RATE), whiten_mat=matrix)
    assert_all_close(batches(found), batches(BinaryFiltered.of(tiles_of(path, matrix=matrix, dead=dead))))


def test_they_are_sent_to_other_processes(path: Path, matrix: np.ndarray) -> None:
    impulse = highpass_impulse(SETTINGS, RATE)
    for bfile in (
        raw(path, tmin=0.1),
        filtered(path, hp_filter=impulse, whiten_mat=matrix),
        BinaryFiltered.of(tiles_of(path, matrix=matrix)),
    ):
        batch = bfile.padded_batch_to_torch(1)
        with pickle.loads(pickle.dumps(bfile)) as again:
            assert torch.equal(again.padded_batch_to_torch(1), batch) and again.imin == bfile.imin
        assert len(pickle.dumps(bfile)) < 1_000_000
        assert "batches of 6000 samples" in repr(bfile)


def test_any_impulse_response(path: Path) -> None:
    late = np.zeros(101)
    late[60] = 2  # ten samples after the middle, twice as large
    stored = raw(path)[:].T
    found = filtered(path, do_CAR=False, hp_filter=late)[1000:2000]
    assert_all_close([found], [torch.from_numpy(2.0 * stored[:, 990:1990]).float()])


def test_arguments_that_contradict_each_other(path: Path, matrix: np.ndarray) -> None:
    with pytest.raises(OpsError, match="whiten_mat has 16 channels, but chan_map has 3"):
        filtered(path, whiten_mat=matrix, chan_map=[1, 2, 3])
    with pytest.raises(OpsError, match="whiten_mat has shape"):
        filtered(path, whiten_mat=matrix[:3])
    with pytest.raises(OpsError, match="dshift has 3 rows, but there are 5 batches"):
        filtered(path, dshift=np.zeros((3, 1)))
    with pytest.raises(SettingsError, match="batch_size"):
        BinaryFiltered(path, 16, NT=100, device=CPU)
    assert math.isinf(filtered(path).tiles.settings.artifact_threshold)
