"""Files of `--mode export` in a checkpoint's place: detector.onnx by onnxruntime, detector.pt2 by torch."""

import importlib.util
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from src.runtime.errors import UserError
from src.ssd.detect import EndToEndDetector
from src.weights.detector import trained_model
from src.weights.files import ONNX, PROGRAM, load_checkpoint

METADATA = "metadata.json"  # in a .pt2 file: what an .onnx file has as its metadata
OUTPUTS = ["boxes", "labels", "scores"]

Run = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


class ExportedDetector(EndToEndDetector):
    """A detector that runs outside of this program's own modules."""

    def __init__(self, run: Run) -> None:
        """run: images [N, 3, 300, 300] uint8 to boxes, labels and scores, as a WholeDetector's `forward`."""
        super().__init__()
        self.run = run

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.run(images)


def require(packages: Iterable[str], *, what: str) -> None:
    """Raises UserError, with the command that installs them, where packages are missing that `what` needs."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise UserError(f"{what} needs {' and '.join(missing)}, which this program does not: pip install {names}")


def load_trained(path: Path) -> dict[str, Any]:
    """`load_checkpoint`, or of an exported file its `categories` and, as `exported`, its bytes.

    Raises UserError for what is neither.
    """
    if path.suffix not in (ONNX, PROGRAM):
        return load_checkpoint(path)
    if path.suffix == ONNX:
        require(["onnxruntime"], what=f"{path}: running it")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    metadata, _ = _open(content, path, torch.device("cpu"))
    categories = [[category["id"], category["name"]] for category in json.loads(metadata["categories"])]
    return {"categories": categories, "exported": content}


def trained_detector(
    state: dict[str, Any], *, backbone: str, num_categories: int, source: Path, device: torch.device
) -> nn.Module:
    """The network of a checkpoint, as `trained_model` has it, or the WholeDetector of an exported file.

    state: of `load_trained(source)`.
    """
    if "exported" in state:
        return ExportedDetector(_open(state["exported"], source, device)[1])
    return trained_model(state, backbone=backbone, num_categories=num_categories, source=source, device=device)


def _open(content: bytes, path: Path, device: torch.device) -> tuple[dict[str, str], Run]:
    """Metadata of an exported file's content, and what runs it on the device."""
    try:
        metadata, run = (_open_onnx if path.suffix == ONNX else _open_program)(content, device)
    except Exception as error:  # whatever strange bytes make the readers raise
        detail = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"{path}: is no {path.suffix} file, or not a whole one ({detail})") from None
    if "categories" not in metadata:
        raise UserError(f"{path}: is no detector of --mode export (detector.onnx or detector.pt2)")
    return metadata, run


def _open_onnx(content: bytes, device: torch.device) -> tuple[dict[str, str], Run]:
    import onnxruntime  # here, because it is optional

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    wanted = ["CPUExecutionProvider"] if device.type == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    session = onnxruntime.InferenceSession(content, options, providers=providers)

    def run(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes, labels, scores = session.run(OUTPUTS, {"images": images.cpu().numpy()})
        return torch.from_numpy(boxes), torch.from_numpy(labels), torch.from_numpy(scores)

    is_detector = [output.name for output in session.get_outputs()] == OUTPUTS  # not network.onnx, nor another's file
    return session.get_modelmeta().custom_metadata_map if is_detector else {}, run


def _open_program(content: bytes, device: torch.device) -> tuple[dict[str, str], Run]:
    extra = {METADATA: ""}
    program = torch.export.load(io.BytesIO(content), extra_files=extra)
    module = move_to_device_pass(program, str(device)).module()
    # A function, because a module of torch.export cannot be told to evaluate, as it can do nothing else.
    return json.loads(extra[METADATA] or "{}"), lambda images: module(images)
