"""Tests of jaxfp4.tensors."""
