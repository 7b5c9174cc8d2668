"""How a weight's codes and scales are chosen, as data. What each does is documented with its function.

A method is made of independent parts: what happens to the channels before, which block scales, which rounding, and
which scale for the activation. `jaxfp4.algorithms` holds the functions.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import ClassVar

from jaxfp4.formats import nvfp4
from jaxfp4.transform.statistics import MomentForm

HEADROOM_DIVISOR = 6 * 256
"""Global amax over global scale where block scales may be chosen larger than max calibration's.

With 6 * 448 the largest blocks have no larger E4M3 scale to go to. Measured on 1024 x 4096 values: a search's relative
error on U(-1, 1) is .00617 instead of .00783, and on N(0, 1) .00659 either way.
"""


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
    """Block scales with the least squared error of each block's output: `jaxfp4.algorithms.local_hessian`."""

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
    order: Order = Order.STATIC
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
class Method:
    """The parts, each by default what max calibration does.

    >>> Method(Mse(), Gptq()).moments
    <MomentForm.FULL: 3>
    """

    scales: Scales = Max()
    rounding: Rounding = Nearest()
    channels: ChannelScaling | None = None
    rotation: Hadamard | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rounding, Gptq) and isinstance(self.scales, LocalHessian):
            raise ValueError(
                "Method(LocalHessian(), Gptq()): wanted Max, Mse, FourOverSix or WeightedMse scales with Gptq, which "
                "takes care of what channels do together itself; use WeightedMse()"
            )

    @property
    def moments(self) -> MomentForm:
        """What it needs to know of the activation's second moments."""
        channels = MomentForm.NONE if self.channels is None else self.channels.moments
        return max(self.scales.moments, self.rounding.moments, channels, key=lambda form: form.value)


MAX_CALIBRATION = Method()
"""Block scales from block amaxes, values to their nearest codes."""
