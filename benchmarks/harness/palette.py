"""The look of figures: Paul Tol's vibrant colours, which colour-blind readers can tell apart, sizes, light and dark.

A figure is one SVG file for both: text and axes have the colour :data:`INK`, which :func:`themed` turns into a variable
of the style sheet that follows the reader's colour scheme. The background is transparent.
"""

BLUE, CYAN, TEAL, ORANGE, RED, MAGENTA = "#0077bb", "#33bbee", "#009988", "#ee7733", "#cc3311", "#ee3377"
GREY = "#777777"
INK, PAPER = "#1f2328", "#fefefe"
_DARK = {INK: ("--ink", "#e6edf3"), PAPER: ("--paper", "#0d1117")}
WIDTH = 7.0  # inches
RC = {
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "sppo-kernels",  # the same bytes with the same version
    **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
    "axes.prop_cycle": f"cycler('color', {[BLUE, ORANGE, MAGENTA, TEAL, CYAN, RED]})",
    "grid.color": GREY,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
}


def themed(svg: str) -> str:
    """Return an SVG file of matplotlib whose ink and paper follow the reader's colour scheme."""
    for colour, (variable, _) in _DARK.items():
        svg = svg.replace(f": {colour}", f": var({variable}, {colour})")
    light = "".join(f"{variable}: {colour};" for colour, (variable, _) in _DARK.items())
    dark = "".join(f"{variable}: {other};" for variable, other in _DARK.values())
    style = f"<style>:root{{{light}}} @media (prefers-color-scheme: dark) {{:root{{{dark}}}}}</style>"
    return svg.replace("<defs>", f"<defs>{style}", 1)
