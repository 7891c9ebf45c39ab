"""Smaller chunks give the same result, and each row is computed once."""

from __future__ import annotations

import pytest
import torch

from ks4stream.kernels.memory import MIN_ROWS, ChunkSize, in_chunks


class Device:
    """Records the chunks it is given, and runs out of memory above a number of rows."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.pieces: list[list[int]] = []

    def __call__(self, number: torch.Tensor, double: torch.Tensor) -> None:
        if len(number) > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        assert torch.equal(2 * number, double)
        self.pieces.append(number.tolist())


@pytest.mark.parametrize(("room", "sizes"), [(100, [70, 30]), (69, [35, 35, 30]), (31, [18, 17, 18, 17, 30])])
def test_pieces_are_halved_until_they_fit(room: int, sizes: list[int]) -> None:
    device, rows = Device(room), torch.arange(100)
    in_chunks(device, rows, 2 * rows, size=70)
    assert [len(piece) for piece in device.pieces] == sizes
    assert [number for piece in device.pieces for number in piece] == list(range(100))


def test_pieces_are_large_on_a_gpu() -> None:
    rows = ChunkSize(cpu=2, gpu=8)
    assert [rows.on(device) for device in ("cpu", torch.device("cpu"), "cuda", torch.device("cuda:1"))] == [2, 2, 8, 8]


def test_what_does_not_fit_in_the_smallest_pieces_is_an_error() -> None:
    device, rows = Device(MIN_ROWS - 1), torch.arange(100)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        in_chunks(device, rows, 2 * rows, size=70)
    assert device.pieces == []
