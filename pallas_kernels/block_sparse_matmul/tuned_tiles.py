"""Tilings found by ``python scripts/benchmark.py tune``; edit by running it, not by hand.

device kind -> operation -> list of (most ring steps a mean output tile may have, tiling). A step is 64 contracted
features. The tables hold density classes, not shapes.
"""

INFINITE = 1 << 30

H100: dict[str, list[tuple[int, dict]]] = {
    "product": [
        (4, {"width": 1, "stages": 3, "stores": 4, "swapped": True}),
        (8, {"width": 2, "swapped": True}),
        (INFINITE, {"width": 4, "swapped": True}),
    ],
    "product_transposed": [
        (8, {"width": 2, "stages": 3, "stores": 4, "swapped": True}),
        (16, {"width": 2, "swapped": True}),
        (INFINITE, {"width": 4, "swapped": True}),
    ],
    "sampled_product": [(INFINITE, {"split": True})],
}
# An H200 is the same chip with faster memory.
TILES = {"NVIDIA H100 80GB HBM3": H100, "NVIDIA H200": H100}

DEFAULT_KIND = "NVIDIA H100 80GB HBM3"
