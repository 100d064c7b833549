"""Exports for other loaders than plain timm's: Hugging Face, open_clip, Prismatic, LLaVA. One file a target.

What travels with an export and runs without locfast lies in `standalone/`.
"""
