"""The probing benchmark of `python -m locfast.probe` (Locality Alignment, section 4.1 and appendix B)."""
