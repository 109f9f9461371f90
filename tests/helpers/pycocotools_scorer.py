"""The reference scorer."""

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def plain_scorer(annotation_file, results_file) -> COCOeval:
    """pycocotools' usual evaluation of the two files."""
    truth = COCO(str(annotation_file))
    scorer = COCOeval(truth, truth.loadRes(str(results_file)), "bbox")
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    return scorer
