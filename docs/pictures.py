"""Makes README.rst's pictures of the demo's: `make pictures`, or `python docs/pictures.py demo/run` after the demo."""

import sys
from pathlib import Path

from PIL import Image

NAMES = ("detections.png", "training.png")
WIDTH = 900  # pixels
COLOURS = 256  # of the palette; with it a picture has a fraction of its bytes


def shrink(picture: Path, copy: Path) -> None:
    """Writes the picture with at most WIDTH pixels across and COLOURS colours."""
    with Image.open(picture) as image:
        small = image.convert("RGB")
    small.thumbnail((WIDTH, small.height), Image.Resampling.LANCZOS)
    # A palette of the colours that lie furthest apart has those of small objects, too.
    small.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(copy, optimize=True)


if __name__ == "__main__":
    for name in NAMES:
        shrink(Path(sys.argv[1], name), Path(__file__).with_name(name))
