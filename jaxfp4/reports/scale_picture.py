"""The block scales of a checkpoint as a picture; needs matplotlib."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxfp4.checkpoints.verification.block_statistics import BlockStatistics
from jaxfp4.checkpoints.verification.quantized_modules import kind_of, layer_of
from jaxfp4.formats import E4M3
from jaxfp4.reports.checkpoint_report import CheckpointReport

_COLUMNS = 3
_EXPONENTS = np.floor(np.log2(E4M3.magnitudes[1:])).astype(int)
EXPONENTS = range(int(_EXPONENTS[0]), int(_EXPONENTS[-1]) + 1)
"""log2 of the block scales, rounded down: -9 to 8."""


def exponent_shares(statistics: BlockStatistics) -> NDArray[np.float64]:
    """The share of the blocks whose scale `s` has each `floor(log2(s))` of `EXPONENTS`; zero and NaN have none."""
    positive = statistics.scale_counts[1 : 1 + _EXPONENTS.size]
    counts = np.bincount(_EXPONENTS - EXPONENTS.start, weights=positive, minlength=len(EXPONENTS))
    return counts / max(statistics.blocks, 1)


def layer_shares(report: CheckpointReport) -> dict[str, dict[int, NDArray[np.float64]]]:
    """Kind of weight -> layer -> `exponent_shares`, the mean over experts; weights in no layer are in layer 0."""
    found: dict[str, dict[int, list[NDArray[np.float64]]]] = {}
    for weight in report.weights:
        if weight.statistics is not None:
            place = layer_of(weight.name)
            of_kind = found.setdefault(kind_of(weight.name), {})
            of_kind.setdefault(place[1] if place else 0, []).append(exponent_shares(weight.statistics))
    return {
        kind: {layer: np.mean(shares, axis=0) for layer, shares in sorted(of_kind.items())}
        for kind, of_kind in found.items()
    }


def scale_picture(report: CheckpointReport) -> Any:
    """A `matplotlib.figure.Figure`: for each kind of weight a heat map, layers by `floor(log2(block scale))`.

    Raises ImportError without matplotlib.
    """
    figure_class = importlib.import_module("matplotlib.figure").Figure
    kinds = layer_shares(report)
    rows, columns = math.ceil(len(kinds) / _COLUMNS), min(len(kinds), _COLUMNS)
    most_layers = max(len(layers) for layers in kinds.values())
    height = rows * (1.3 + min(max(0.2 * most_layers, 0.6), 6.0))
    figure = figure_class(figsize=(5.0 * columns + 1, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    image = None
    for place in axes.flat[len(kinds) :]:
        place.set_visible(False)
    for place, (kind, layers) in zip(axes.flat, kinds.items(), strict=False):
        image = place.imshow(
            np.stack(list(layers.values())), aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest"
        )
        place.set_title(kind.removeprefix("model.").replace("layers.{layer}.", ""), fontsize=9)
        place.set_xticks(range(0, len(EXPONENTS), 2), [str(exponent) for exponent in EXPONENTS[::2]])
        numbers = list(layers)
        step = max(1, len(numbers) // 16)
        place.set_yticks(range(0, len(numbers), step), [str(number) for number in numbers[::step]])
        place.set_ylabel("layer")
        place.set_xlabel("log2 of the block scale, rounded down")
    figure.suptitle("Distribution of E4M3 block scales (448 is at 8)", fontsize=11)
    figure.colorbar(image, ax=axes, label="share of the layer's blocks")
    return figure
