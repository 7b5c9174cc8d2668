"""Layer 0: E2M1 and E4M3 as data, exact encoding and decoding, packing. Knows no mesh and no model."""

from jaxfp4.formats.errors import LeafError as LeafError
from jaxfp4.formats.errors import path_string as path_string
from jaxfp4.formats.minifloat import BLOCK_SIZE as BLOCK_SIZE
from jaxfp4.formats.minifloat import E2M1 as E2M1
from jaxfp4.formats.minifloat import E4M3 as E4M3
from jaxfp4.formats.minifloat import MinifloatFormat as MinifloatFormat
