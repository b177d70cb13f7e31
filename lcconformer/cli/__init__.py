"""The commands of ``lcconformer``: one module each, with its arguments and its output.

The work itself is done by library modules: ``info``, ``doctor``, ``tune`` and the package ``ssl``.
"""
