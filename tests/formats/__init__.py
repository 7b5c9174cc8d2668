"""Tests of jaxfp4.formats."""
