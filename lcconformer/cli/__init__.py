"""The commands of ``python -m lcconformer``: one module each, with its arguments and what it prints."""
