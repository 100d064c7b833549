"""Counter-based random numbers: a pure function of (key, counter), the same bits on CPU, CUDA and in Triton."""

from .reference import MASK32, philox, rounds

__all__ = ["MASK32", "philox", "rounds"]
