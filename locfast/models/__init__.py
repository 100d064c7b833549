"""Backbones: one wrapper over timm's Vision Transformers, their checkpoints, the soft cap and the export."""
