"""`python -m locfast.inspect MODEL`: the shapes of a backbone, and what locfast can do with it."""

from __future__ import annotations

import argparse

from locfast.cli import command


@command
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m locfast.inspect", description=__doc__)
    parser.add_argument("model", help="a timm name, hf-hub:org/name, a local timm folder, ARCHITECTURE@FILE, or demo")
    parser.add_argument("--image-size", type=int, help="pixels of a side, where not the model's own")
    parser.add_argument(
        "--pretrained", action="store_true", help="load the weights too, to see whether they can be had"
    )
    args = parser.parse_args()

    from locfast.models.backbone import load_backbone

    backbone = load_backbone(args.model, args.pretrained, image_size=args.image_size)
    prefix, patches = backbone.num_prefix_tokens, backbone.num_patches
    parameters = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    facts = {
        "model": f"{backbone.name} ({type(backbone.model).__name__})",
        "images": f"{backbone.image_size[0]} x {backbone.image_size[1]} px, mean {backbone.mean}, std {backbone.std}",
        "resize": f"crop_pct {backbone.crop_pct}, {backbone.interpolation}",
        "patches": f"{backbone.grid[0]} x {backbone.grid[1]} of {backbone.patch_size[0]} px",
        "tokens": f"{prefix} prefix + {patches} patches = {backbone.num_tokens}",
        "blocks": f"{backbone.depth} of width {backbone.embed_dim}, {backbone.num_heads} heads, {backbone.mlp_kind}",
        "final norm": f"eps {backbone.norm_eps}" if backbone.has_final_norm else "none",
        "parameters": f"{parameters / 1e6:.1f} M behind patch features",
        "soft cap": "yes" if backbone.supports_softcap else "no, its blocks run only as timm wrote them",
        "licence": backbone.model.pretrained_cfg.get("license") or "not known to timm",
    }
    width = max(map(len, facts))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))


if __name__ == "__main__":
    main()
