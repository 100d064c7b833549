"""Boxes and phrases on images: how they are written, checked, and carried into a view."""
