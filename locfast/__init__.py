"""locfast post-trains Vision Transformers so that every patch embedding knows what is at its place."""

__version__ = "0.1.0"
