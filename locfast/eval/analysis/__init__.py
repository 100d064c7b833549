"""What backbones attend to, and how their features spread, layer by layer (LUT, section 6.2)."""
