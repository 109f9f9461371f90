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
DARK_COLOURS = (GREEN, VERMILION, BLUE)  # with white letters on them

DPI = 120
PANEL, TITLE, GAP = 330, 26, 10  # pixels: longer side of an image in a grid, height of its title, space around
LETTERS = 13  # pixels, the size of the letters in a grid
NAME_LENGTH = 24  # characters; longer names are cut
MOST_BOXES = 40  # drawn on an image; more hide it, and take long


class Panel(NamedTuple):
    """An image with the boxes to draw on it, the most important first, of which MOST_BOXES are drawn."""

    title: str
    image: np.ndarray  # [H, W, 3] uint8
    boxes: np.ndarray  # [B, 4]
    names: Sequence[str]
    scores: np.ndarray | None = None  # [B]


def short(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, in the order of their first use; where some share one, the labels tell them apart."""
    return {name: BOX_COLOURS[i % len(BOX_COLOURS)] for i, name in enumerate(dict.fromkeys(names))}


class _Pixels(Artist):
    """An image [H, W, 3] uint8 in the figure's lower left corner, pixel for pixel, below everything else.

    `Figure.figimage` would resample it all the same, which takes many times as long.
    """

    zorder = -1

    def __init__(self, image: np.ndarray) -> None:
        super().__init__()
        self.image = image

    def draw(self, renderer: RendererBase) -> None:
        opaque = np.full((*self.image.shape[:2], 4), 255, dtype=np.uint8)
        opaque[..., :3] = self.image[::-1]  # the renderer counts rows from below
        context = renderer.new_gc()
        renderer.draw_image(context, 0, 0, opaque)
        context.restore()


def photograph(panel: Panel, colours: dict[str, str]) -> Figure:
    """The panel's image pixel for pixel, without its title; boxes and letters grow with it."""
    height, width = panel.image.shape[:2]
    figure = _pixel_figure(width, height)
    figure.add_artist(_Pixels(panel.image), clip=False)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    _draw_boxes(axes, panel, colours, letters=max(LETTERS, 0.025 * min(width, height)))
    return figure


def grid(panels: Sequence[Panel], colours: dict[str, str], columns: int) -> Figure:
    """The panels row by row, each image below its title and as large as its place allows."""
    columns = min(columns, max(1, len(panels)))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [TITLE + GAP + max(round(_shown_size(panel)[1]) for panel in row) for row in rows]
    width, height = columns * (PANEL + GAP) + GAP, max(sum(heights), PANEL) + GAP
    figure = _pixel_figure(width, height)
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        shown_width, shown_height = _shown_size(panel)
        left, bottom = GAP + column * (PANEL + GAP), height - sum(heights[:row]) - TITLE - shown_height
        axes = figure.add_axes((left / width, bottom / height, shown_width / width, shown_height / height))
        axes.imshow(panel.image, extent=(0, panel.image.shape[1], panel.image.shape[0], 0), aspect="auto")
        axes.set_title(panel.title, fontsize=_points(LETTERS + 2), loc="left", pad=_points(5))
        _draw_boxes(axes, panel, colours, letters=LETTERS)
    return figure


def _shown_size(panel: Panel) -> np.ndarray:
    """Width and height of the image in its place, in pixels."""
    size = np.array(panel.image.shape[1::-1])
    return size * PANEL / size.max()


def _pixel_figure(width: int, height: int) -> Figure:
    """A figure of so many pixels."""
    figure = Figure(figsize=((width + 0.01) / DPI, (height + 0.01) / DPI), dpi=DPI)  # matplotlib rounds down
    FigureCanvasAgg(figure)
    return figure


def _points(pixels: float) -> float:
    return pixels * 72 / DPI


def _draw_boxes(axes: Axes, panel: Panel, colours: dict[str, str], letters: float) -> None:
    """Draws the boxes, with labels where there is room for them, and tells how many more there are.

    letters: their size in pixels.
    """
    axes.set_axis_off()
    halo = [withStroke(linewidth=_points(letters * 0.32), foreground=BLACK)]
    line: dict[str, Any] = {"fill": False, "linewidth": _points(letters * 0.16), "path_effects": halo}
    taken: list[Bbox] = []
    drawn = list(zip(panel.boxes, panel.names, strict=True))[:MOST_BOXES]
    if len(drawn) < len(panel.boxes):
        corner = np.tile(axes.bbox.min, (2, 1))
        _draw_label(axes, corner, f"and {len(panel.boxes) - len(drawn)} more", "white", letters, taken)
    for number, (box, name) in enumerate(drawn):
        corners = np.reshape(box, (2, 2))
        size = corners[1] - corners[0]
        order = 2 - number / len(drawn)  # the first on top
        axes.add_patch(Rectangle(corners[0], *size, edgecolor=colours[name], zorder=order, **line))
        score = "" if panel.scores is None else f" {panel.scores[number]:.2f}"
        _draw_label(axes, axes.transData.transform(corners), short(name) + score, colours[name], letters, taken)


def _draw_label(axes: Axes, corners: np.ndarray, label: str, colour: str, letters: float, taken: list[Bbox]) -> None:
    """Writes a label at its box where no other label stands, or not at all; adds its place to `taken`.

    corners: [[left, top], [right, bottom]] of the box in pixels of the figure, y upwards.
    """
    margin = letters * 0.15
    text = axes.text(
        *(0, 0, label),
        transform=IdentityTransform(),
        fontsize=_points(letters),
        color="white" if colour in DARK_COLOURS else "black",
        bbox={"facecolor": colour, "edgecolor": "none", "pad": _points(margin)},
        parse_math=False,
        clip_on=True,
    )
    extent = text.get_window_extent()
    size = np.array((extent.width, extent.height)) + 2 * margin
    for corner in _label_places(corners, size, axes.bbox):
        place = Bbox.from_bounds(*corner, *size)
        if not any(place.overlaps(other) for other in taken):
            taken.append(place)
            text.set_position(corner + margin - (extent.x0, extent.y0))
            return
    text.remove()


def _label_places(corners: np.ndarray, size: np.ndarray, frame: Bbox) -> Iterator[np.ndarray]:
    """Where a label of that size may stand: lower left corners, inside the frame; arguments as in `_draw_label`."""
    (left, top), (right, bottom) = corners
    width, height = size
    across = (left, right - width)
    down = [top, top - height, bottom - height, bottom, *np.arange(top - 2 * height, bottom, -height)]
    for y in down:
        for x in across:
            yield np.maximum(np.minimum((x, y), frame.max - size), frame.min)
