"""Universal detection on one tile, shared by the drift pass and the template pass (section 3)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ks4stream.blocks import Tile
from ks4stream.geometry import Centres
from ks4stream.kernels import detection as kernels
from ks4stream.results import Waveforms
from ks4stream.stages.preprocessing import Preprocessor
from ks4stream.stages.waveforms import away_from


@dataclass(frozen=True, eq=False)
class Detector:
    """Finds the peaks a tile owns."""

    source: Preprocessor
    centres: Centres
    waveforms: Waveforms
    _ready: dict[str, kernels.UniversalTemplates] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ready": {}}

    def peaks(self, tile: Tile) -> tuple[Tensor, kernels.Peaks]:
        """Whitened traces (c, t) and the peaks whose reported time lies in the tile's core.

        ``Peaks.sample`` is the centre of the window; :meth:`time_of` makes it the time in the recording.
        """
        settings = self.source.settings
        traces, blank = self.source.whitened(tile)
        core = self.source.core(tile)
        to_centre = settings.nt // 2 - settings.peak_sample
        peaks = kernels.detect(
            traces,
            self.templates,
            threshold=settings.Th_universal,
            reach=max(settings.peak_sample, kernels.BIN - 1),  # detection needs the window to hold a bin
            first=core.start + to_centre,
            last=core.stop + to_centre,
        )
        allowed = away_from(self.source, tile, peaks.sample, blank)
        return traces, kernels.Peaks(*(column[allowed] for column in peaks))

    def time_of(self, tile: Tile, sample: Tensor) -> Tensor:
        """Time of the waveform's peak in the recording, from the window's centre in the tile."""
        return sample + (tile.first - self.source.settings.nt // 2 + self.source.settings.peak_sample)

    @property
    def templates(self) -> kernels.UniversalTemplates:
        """The universal templates as tensors, made on first use."""
        if "templates" not in self._ready:
            self._ready["templates"] = self._make_templates()
        return self._ready["templates"]

    def _make_templates(self) -> kernels.UniversalTemplates:
        centres, device = self.centres, self.source.device

        def tensor(values: Any) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(device)

        return kernels.universal_templates(
            tensor(self.waveforms.shapes),
            tensor(self.waveforms.components),
            channels=tensor(centres.channels),
            weights=tensor(centres.weights),
            neighbours=tensor(centres.neighbours),
            depth_um=tensor(self.source.probe.y_um.astype(np.float32)),
        )
