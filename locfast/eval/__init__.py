"""What judges a backbone: the patch probe of the locality alignment paper, and the report's pictures."""
