"""Strict JAX, and the devices that the arithmetic is tested on."""

from strict_jax import backend as backend
from strict_jax import strict_promotion as strict_promotion
