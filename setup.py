"""Only what pyproject.toml cannot say yet: which script builds the compiled extension."""

from setuptools import setup

setup(cffi_modules=["native/ffi/build.py:ffibuilder"])
