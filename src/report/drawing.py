"""Images with boxes and labels on them, alone or in a grid, on matplotlib figures measured in pixels.

Boxes are ltrb in pixels of the image that they lie in; names may be any text.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox, IdentityTransform

# Okabe and Ito's colours, which colour-blind readers can tell apart: jfly.uni-koeln.de/color
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
BOX_COLOURS = (ORANGE, SKY, GREEN, YELLOW, VERMILION, BLUE, PURPLE)
DARK_COLOURS = (GREEN, VERMILION, BLUE)  # labels on these are white

DPI = 120
# In a grid, in pixels: longer side of an image, height of its title, space around both, size of the font.
PANEL_SIDE, TITLE_HEIGHT, GAP, FONT_PIXELS = 330, 26, 10, 13
MAX_NAME_LENGTH = 24  # characters; longer names are cut
MAX_BOXES = 40  # an image; more hide it and take long to draw


class Panel(NamedTuple):
    """An image and its boxes, the most important first; the first MAX_BOXES are drawn."""

    title: str
    image: np.ndarray  # [H, W, 3] uint8
    boxes: np.ndarray  # [B, 4]
    names: Sequence[str]
    scores: np.ndarray | None = None  # [B]


def shorten(name: str) -> str:
    """The name, cut to MAX_NAME_LENGTH characters."""
    return name if len(name) <= MAX_NAME_LENGTH else name[: MAX_NAME_LENGTH - 1] + "…"


def assign_colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, in the order of their first use; with more names than colours, some share one."""
    return {name: BOX_COLOURS[i % len(BOX_COLOURS)] for i, name in enumerate(dict.fromkeys(names))}


class _Pixels(Artist):
    """An image [H, W, 3] uint8 in the figure's lower left corner, unscaled, below everything else.

    `Figure.figimage` resamples an image even at its own size, which takes many times as long.
    """

    zorder = -1

    def __init__(self, image: np.ndarray) -> None:
        super().__init__()
        self.image = image

    def draw(self, renderer: RendererBase) -> None:
        opaque = np.full((*self.image.shape[:2], 4), 255, dtype=np.uint8)
        opaque[..., :3] = self.image[::-1]  # the renderer's first row is the lowest
        context = renderer.new_gc()
        renderer.draw_image(context, 0, 0, opaque)
        context.restore()


def draw_image(panel: Panel, colours: dict[str, str]) -> Figure:
    """The panel's image, unscaled and without its title; lines and font grow with the image."""
    height, width = panel.image.shape[:2]
    figure = _pixel_figure(width, height)
    figure.add_artist(_Pixels(panel.image), clip=False)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    _draw_boxes(axes, panel, colours, max(FONT_PIXELS, 0.025 * min(width, height)))
    return figure


def draw_grid(panels: Sequence[Panel], colours: dict[str, str], columns: int) -> Figure:
    """The panels row by row; each image stands below its title, its longer side scaled to PANEL_SIDE."""
    columns = min(columns, max(1, len(panels)))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [TITLE_HEIGHT + GAP + max(round(_shown_size(panel)[1]) for panel in row) for row in rows]
    width, height = columns * (PANEL_SIDE + GAP) + GAP, max(sum(heights), PANEL_SIDE) + GAP
    figure = _pixel_figure(width, height)
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        shown_width, shown_height = _shown_size(panel)
        left = GAP + column * (PANEL_SIDE + GAP)
        bottom = height - sum(heights[:row]) - TITLE_HEIGHT - shown_height
        axes = figure.add_axes((left / width, bottom / height, shown_width / width, shown_height / height))
        axes.imshow(panel.image, extent=(0, panel.image.shape[1], panel.image.shape[0], 0), aspect="auto")
        axes.set_title(panel.title, fontsize=_points(FONT_PIXELS + 2), loc="left", pad=_points(5))
        _draw_boxes(axes, panel, colours, FONT_PIXELS)
    return figure


def _shown_size(panel: Panel) -> np.ndarray:
    """Width and height of the image in a grid, in pixels, [2]."""
    size = np.array(panel.image.shape[1::-1])
    return size * PANEL_SIDE / size.max()


def _pixel_figure(width: int, height: int) -> Figure:
    """A figure of that size in pixels."""
    # 0.01 pixels more, because matplotlib rounds down.
    figure = Figure(figsize=((width + 0.01) / DPI, (height + 0.01) / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def _points(pixels: float) -> float:
    return pixels * 72 / DPI


def _draw_boxes(axes: Axes, panel: Panel, colours: dict[str, str], font_pixels: float) -> None:
    """Draws the first MAX_BOXES boxes, labels as far as there is room, and the number of the other boxes."""
    axes.set_axis_off()
    halo = [withStroke(linewidth=_points(font_pixels * 0.32), foreground=BLACK)]
    line: dict[str, Any] = {"fill": False, "linewidth": _points(font_pixels * 0.16), "path_effects": halo}
    taken: list[Bbox] = []
    drawn = list(zip(panel.boxes, panel.names, strict=True))[:MAX_BOXES]
    if len(drawn) < len(panel.boxes):
        corner = np.tile(axes.bbox.min, (2, 1))
        _draw_label(axes, corner, f"and {len(panel.boxes) - len(drawn)} more", "white", font_pixels, taken)
    for number, (box, name) in enumerate(drawn):
        corners = np.reshape(box, (2, 2))
        size = corners[1] - corners[0]
        order = 2 - number / len(drawn)  # the first box on top
        axes.add_patch(Rectangle(corners[0], *size, edgecolor=colours[name], zorder=order, **line))
        score = "" if panel.scores is None else f" {panel.scores[number]:.2f}"
        _draw_label(axes, axes.transData.transform(corners), shorten(name) + score, colours[name], font_pixels, taken)


def _draw_label(
    axes: Axes, corners: np.ndarray, label: str, colour: str, font_pixels: float, taken: list[Bbox]
) -> None:
    """Writes a label where it overlaps none of `taken`, to which it is added; without such a place writes nothing.

    corners: [[left, top], [right, bottom]] of the label's box in pixels of the figure, y upwards.
    """
    margin = font_pixels * 0.15
    text = axes.text(
        *(0, 0, label),
        transform=IdentityTransform(),
        fontsize=_points(font_pixels),
        color="white" if colour in DARK_COLOURS else "black",
        bbox={"facecolor": colour, "edgecolor": "none", "pad": _points(margin)},
        parse_math=False,
        clip_on=True,
    )
    extent = text.get_window_extent()
    size = np.array((extent.width, extent.height)) + 2 * margin
    for corner in _candidate_corners(corners, size, axes.bbox):
        candidate = Bbox.from_bounds(*corner, *size)
        if not any(candidate.overlaps(other) for other in taken):
            taken.append(candidate)
            text.set_position(corner + margin - (extent.x0, extent.y0))
            return
    text.remove()


def _candidate_corners(corners: np.ndarray, size: np.ndarray, frame: Bbox) -> Iterator[np.ndarray]:
    """Lower left corners [2] that a label of that size can have near its box and inside the frame, best first.

    corners: of the box, as in `_draw_label`.
    """
    (left, top), (right, bottom) = corners
    width, height = size
    columns = (left, right - width)
    rows = [top, top - height, bottom - height, bottom, *np.arange(top - 2 * height, bottom, -height)]
    for y in rows:
        for x in columns:
            yield np.maximum(np.minimum((x, y), frame.max - size), frame.min)
