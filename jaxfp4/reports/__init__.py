"""Layer 4: what quantization cost, as data and as tables."""

from jaxfp4.reports.weights import WeightQuality as WeightQuality
from jaxfp4.reports.weights import quality_table as quality_table
from jaxfp4.reports.weights import weight_quality as weight_quality
