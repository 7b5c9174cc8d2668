"""NVFP4 post-training quantization for JAX and Flax models whose parameters live sharded on a mesh.

The same bytes on every mesh: packed codes, block scales and global scales are reductions over the logical tensors.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from jaxfp4 import recipes as recipes
from jaxfp4.algorithms import calibrate as calibrate
from jaxfp4.algorithms import digest as digest
from jaxfp4.algorithms import fold_channel_scales as fold_channel_scales
from jaxfp4.algorithms import make_calibrate_fn as make_calibrate_fn
from jaxfp4.algorithms import quantize_params as quantize_params
from jaxfp4.algorithms import quantize_sequentially as quantize_sequentially
from jaxfp4.algorithms import quantized as quantized
from jaxfp4.algorithms import unseen_experts as unseen_experts
from jaxfp4.algorithms import weights as weights
from jaxfp4.checkpoints import export_checkpoint as export_checkpoint
from jaxfp4.checkpoints import load_checkpoint as load_checkpoint
from jaxfp4.checkpoints import restore as restore
from jaxfp4.checkpoints import save as save
from jaxfp4.checkpoints import verify_checkpoint as verify_checkpoint
from jaxfp4.recipes import Plan as Plan
from jaxfp4.recipes import Recipe as Recipe
from jaxfp4.recipes import Role as Role
from jaxfp4.recipes import Rule as Rule
from jaxfp4.recipes import Scheme as Scheme
from jaxfp4.recipes import plan as plan
from jaxfp4.tensors import NVFP4Tensor as NVFP4Tensor
from jaxfp4.tensors import QuantizedWeight as QuantizedWeight
from jaxfp4.tensors import block_amax as block_amax
from jaxfp4.tensors import fake_quantize as fake_quantize
from jaxfp4.tensors import global_amax as global_amax
from jaxfp4.tensors import quantize as quantize

if TYPE_CHECKING:
    from jaxfp4 import models as models
    from jaxfp4.models import from_flax as from_flax
else:

    def __getattr__(name: str) -> Any:
        """`models` and `from_flax`, on their first use: work on files alone starts without loading Flax."""
        if name not in ("models", "from_flax"):
            raise AttributeError(f"module 'jaxfp4' has no attribute {name!r}")
        models = importlib.import_module("jaxfp4.models")
        return models if name == "models" else models.from_flax

    def __dir__() -> list[str]:
        return sorted({*globals(), "models", "from_flax"})


__version__ = importlib.metadata.version("jaxfp4")
