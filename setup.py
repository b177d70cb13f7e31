from setuptools import setup

# everything is declared in pyproject.toml; this file is where the compiled extension will be configured
setup()
