"""Checkpoints quantized and converted tensor by tensor, without a model and without holding one."""
