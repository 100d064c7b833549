"""The embedded demos, one a method: what `python -m locfast.train --method NAME` runs with no other flag."""

DEMOS = {
    "cloc": "locfast.demo.cloc:run_demo",
    "lut": "locfast.demo.lut:run_demo",
    "maskembed": "locfast.demo.run:run_demo",
    "uta": "locfast.demo.uta:run_demo",
}
"""Method -> where its demo is, as module:name. Its settings are those of the recipe `demo_recipe` names."""


def demo_recipe(method: str) -> str:
    """The recipe of the method's demo: demo for MaskEmbed, which came first, else demo_METHOD."""
    return "demo" if method == "maskembed" else f"demo_{method}"
