"""Every test here runs small models, on one thread."""

from tests.models.exporters.small import one_thread

__all__ = ["one_thread"]
