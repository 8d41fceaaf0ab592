"""tailor_engine: turn a general language model into a small, fast specialist."""

__version__ = "0.1.0"
