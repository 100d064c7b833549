"""Counter-based random numbers: a pure function of (key, counter), the same bits on CPU, CUDA and in Triton."""

from .reference import philox

__all__ = ["philox"]
