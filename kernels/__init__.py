"""GPU kernels of adamw_triton; installed as ``adamw_triton.kernels``."""
