"""lcconformer: a Conformer encoder for speech whose layers share one set of weights."""

__version__ = "0.1.0"
