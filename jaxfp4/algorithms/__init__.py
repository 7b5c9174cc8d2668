"""Layer 3: calibration and quantization. Arrays and statistics in, quantized weights out."""

from jaxfp4.algorithms.calibration import calibrate as calibrate
from jaxfp4.algorithms.calibration import make_calibrate_fn as make_calibrate_fn
from jaxfp4.algorithms.calibration import observed as observed
from jaxfp4.algorithms.channels import after_folding as after_folding
from jaxfp4.algorithms.channels import fold_channel_scales as fold_channel_scales
from jaxfp4.algorithms.digest import digest as digest
from jaxfp4.algorithms.digest import weights as weights
from jaxfp4.algorithms.quantization import quantize_params as quantize_params
from jaxfp4.algorithms.sequential import quantize_sequentially as quantize_sequentially
from jaxfp4.algorithms.simulation import quantized as quantized
from jaxfp4.algorithms.statistics import input_scales as input_scales
from jaxfp4.algorithms.statistics import unseen_experts as unseen_experts
