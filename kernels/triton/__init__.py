"""GPU kernels in Triton, one file per op, installed as ``tailor_engine.kernels``."""
