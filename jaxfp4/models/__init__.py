"""Layer 4: the reference decoder, its checkpoints, and the built-in model. The only place that imports flax."""

from jaxfp4.models.adapters import from_flax as from_flax
from jaxfp4.models.builtin import BUILTIN_DIRECTORY as BUILTIN_DIRECTORY
from jaxfp4.models.builtin import bits_per_byte as bits_per_byte
from jaxfp4.models.builtin import builtin_config as builtin_config
from jaxfp4.models.builtin import load_builtin as load_builtin
from jaxfp4.models.config import SUPPORTED_MODEL_TYPES as SUPPORTED_MODEL_TYPES
from jaxfp4.models.config import DecoderConfig as DecoderConfig
from jaxfp4.models.corpus import calibration_batches as calibration_batches
from jaxfp4.models.corpus import heldout_batches as heldout_batches
from jaxfp4.models.corpus import heldout_bytes as heldout_bytes
from jaxfp4.models.corpus import training_bytes as training_bytes
from jaxfp4.models.decoder import Decoder as Decoder
from jaxfp4.models.hf_layout import checkpoint_names as checkpoint_names
from jaxfp4.models.hf_layout import load_decoder as load_decoder
from jaxfp4.models.hf_layout import read_config as read_config
from jaxfp4.models.hf_layout import save_decoder as save_decoder
from jaxfp4.models.sharding import parameter_shapes as parameter_shapes
from jaxfp4.models.sharding import partition_specs as partition_specs
from jaxfp4.models.sharding import shardings as shardings
