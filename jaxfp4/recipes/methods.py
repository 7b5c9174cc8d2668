"""How a weight's codes and scales are chosen, as data. What each does is documented with its function.

A method is made of independent parts: what happens to the channels before, which block scales, which rounding, and
which scale for the activation. `jaxfp4.algorithms` holds the functions.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import ClassVar

from jaxfp4.formats import E4M3, nvfp4
from jaxfp4.transform.statistics import MomentForm

HEADROOM_DIVISOR = 6 * 256
"""Global amax over global scale where block scales may be chosen larger than max calibration's.

With 6 * 448 the largest blocks have no larger E4M3 scale to go to. Measured on 1024 x 4096 values: a search's relative
error on U(-1, 1) is .00617 instead of .00783, and on N(0, 1) .00659 either way.
"""

MOST_HEADROOM = int(E4M3.max / E4M3.smallest_normal)
"""The largest block amax over the smallest whose block scales are both normal E4M3 numbers."""


@dataclasses.dataclass(frozen=True)
class Max:
    """Block scales from block amaxes."""

    divisor: ClassVar[int] = nvfp4.TENSOR_DIVISOR
    moments: ClassVar[MomentForm] = MomentForm.NONE


@dataclasses.dataclass(frozen=True)
class Mse:
    """Block scales with the least squared error: `jaxfp4.algorithms.mse`."""

    divisor: ClassVar[int] = HEADROOM_DIVISOR
    moments: ClassVar[MomentForm] = MomentForm.NONE


@dataclasses.dataclass(frozen=True)
class FourOverSix:
    """The largest value of a block at 6 or at 4: `jaxfp4.algorithms.four_over_six`."""

    divisor: ClassVar[int] = HEADROOM_DIVISOR
    moments: ClassVar[MomentForm] = MomentForm.NONE


@dataclasses.dataclass(frozen=True)
class WeightedMse:
    """As `Mse`, each square weighted with the sum of squares of the activation's channel."""

    divisor: ClassVar[int] = HEADROOM_DIVISOR
    moments: ClassVar[MomentForm] = MomentForm.DIAGONAL


@dataclasses.dataclass(frozen=True)
class LocalHessian:
    """Block scales with the least squared error of each block's output: `jaxfp4.algorithms.local_hessian`.

    With `channels=Awq()` these are AWQ's scales and its clipping.
    """

    divisor: ClassVar[int] = HEADROOM_DIVISOR
    moments: ClassVar[MomentForm] = MomentForm.BLOCKS


Scales = Max | Mse | FourOverSix | WeightedMse | LocalHessian


@dataclasses.dataclass(frozen=True)
class Nearest:
    """Each value to its nearest code."""

    moments: ClassVar[MomentForm] = MomentForm.NONE


class Order(enum.Enum):
    """The order in which GPTQ rounds the channels of a contraction."""

    STATIC = "static"
    """As they lie."""
    ACTIVATION = "activation"
    """Those with the largest activations first."""


@dataclasses.dataclass(frozen=True)
class Gptq:
    """Errors made good by the values not yet rounded: `jaxfp4.algorithms.gptq`."""

    damping: float = 0.01
    order: Order = Order.ACTIVATION
    moments: ClassVar[MomentForm] = MomentForm.FULL


Rounding = Nearest | Gptq


@dataclasses.dataclass(frozen=True)
class SmoothQuant:
    """Channels scaled by `amax(x)**alpha / amax(w)**(1 - alpha)`: `jaxfp4.algorithms.smoothquant`."""

    alpha: float = 0.5
    moments: ClassVar[MomentForm] = MomentForm.NONE


@dataclasses.dataclass(frozen=True)
class Awq:
    """Channels scaled by a searched power of their mean magnitude: `jaxfp4.algorithms.awq`."""

    steps: int = 20
    moments: ClassVar[MomentForm] = MomentForm.FULL


ChannelScaling = SmoothQuant | Awq


@dataclasses.dataclass(frozen=True)
class Hadamard:
    """Groups of `size` channels rotated: `jaxfp4.tensors.hadamard`. No serving engine applies it to activations."""

    size: int = 16


@dataclasses.dataclass(frozen=True)
class MaxActivations:
    """The activation's global amax: the largest magnitude seen."""

    histogram: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class PercentileActivations:
    """A percentile of the block amaxes: `jaxfp4.algorithms.activation_scales`."""

    percentile: float = 99.99
    histogram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _refuse_percentile("PercentileActivations", "percentile", self.percentile)


@dataclasses.dataclass(frozen=True)
class MseActivations:
    """The least expected squared error of a block relative to its amax: `jaxfp4.algorithms.activation_scales`."""

    histogram: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class HeadroomActivations:
    """`max(rho * anchor, upper)`, percentiles of the block amaxes, as Model-Optimizer's `nvfp4_act_headroom`.

    Room for larger activations than calibration saw; `jaxfp4.algorithms.activation_scales`.
    """

    anchor_percentile: float = 1.0
    upper_percentile: float = 99.99
    rho: float = 16384
    histogram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _refuse_percentile("HeadroomActivations", "anchor_percentile", self.anchor_percentile)
        _refuse_percentile("HeadroomActivations", "upper_percentile", self.upper_percentile)
        if not 0 < self.rho < MOST_HEADROOM:
            raise ValueError(
                f"HeadroomActivations(rho={self.rho!r}): wanted more than 0 and less than {MOST_HEADROOM}, from where "
                "the anchor's block scale is no normal E4M3 number; leave it out for 16384"
            )


Activations = MaxActivations | PercentileActivations | MseActivations | HeadroomActivations


def _refuse_percentile(name: str, field: str, value: float) -> None:
    if not 0 < value <= 100:
        raise ValueError(f"{name}({field}={value!r}): wanted more than 0 and at most 100; 100 is the largest amax")


@dataclasses.dataclass(frozen=True)
class Method:
    """The parts, each by default what max calibration does.

    >>> Method(Mse(), Gptq()).moments
    <MomentForm.FULL: 3>
    """

    scales: Scales = Max()
    rounding: Rounding = Nearest()
    channels: ChannelScaling | None = None
    rotation: Hadamard | None = None
    activations: Activations = MaxActivations()
    """The global scale of a W4A4 weight's activation; W4A16 has none."""

    def __post_init__(self) -> None:
        if isinstance(self.rounding, Gptq) and isinstance(self.scales, LocalHessian):
            raise ValueError(
                "Method(LocalHessian(), Gptq()): wanted Max, Mse, FourOverSix or WeightedMse scales with Gptq, which "
                "takes care of what channels do together itself; use WeightedMse()"
            )
        if self.channels is not None and self.activations != MaxActivations():
            raise ValueError(
                f"Method(channels={self.channels}, activations={self.activations}): wanted MaxActivations() with "
                "channels, as block amaxes are collected before the channels are scaled; leave one of them out"
            )

    def __str__(self) -> str:
        """The names of the parts that differ from max calibration, in the order in which they are applied."""
        parts = [self.channels, self.rotation, self.scales, self.rounding, self.activations]
        plain = (Max(), Nearest(), MaxActivations())
        return ", ".join(_words(type(part).__name__) for part in parts if part is not None and part not in plain)

    @property
    def rotated(self) -> int:
        """The size of the groups of channels in which weight and activation are rotated; 0 for none."""
        return 0 if self.rotation is None else self.rotation.size

    @property
    def moments(self) -> MomentForm:
        """What it needs to know of the activation's second moments."""
        channels = MomentForm.NONE if self.channels is None else self.channels.moments
        return max(self.scales.moments, self.rounding.moments, channels, key=lambda form: form.value)


def _words(name: str) -> str:
    """A class name in the form that recipes' names have."""
    return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))


MAX_CALIBRATION = Method()
"""Block scales from block amaxes, values to their nearest codes."""
