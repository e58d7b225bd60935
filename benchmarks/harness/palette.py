"""The look of figures: Paul Tol's vibrant colours, which colour-blind readers can tell apart, and sizes."""

BLUE, CYAN, TEAL, ORANGE, RED, MAGENTA = "#0077bb", "#33bbee", "#009988", "#ee7733", "#cc3311", "#ee3377"
GREY = "#777777"
WIDTH = 7.0  # inches; at 200 dots per inch a page shows half of the pixels or fewer
RC = {
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
