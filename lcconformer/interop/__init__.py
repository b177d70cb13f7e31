"""Models of other packages: accelerated in place, or converted to ours."""

from .convert import to_lcconformer

__all__ = ["to_lcconformer"]
