"""Layer 4: what quantization cost, as data and as tables."""

from jaxfp4.reports.quality import OutputQuality as OutputQuality
from jaxfp4.reports.quality import Reference as Reference
from jaxfp4.reports.quality import output_quality as output_quality
from jaxfp4.reports.quality import reference_logits as reference_logits
from jaxfp4.reports.weights import WeightQuality as WeightQuality
from jaxfp4.reports.weights import quality_table as quality_table
from jaxfp4.reports.weights import weight_quality as weight_quality
