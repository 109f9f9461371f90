"""Runs `--mode export`'s detector.onnx in onnxruntime, so that it can be given as a checkpoint."""

import importlib
import io
import json
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.runtime.errors import UserError
from src.ssd.detect import EndToEndDetector
from src.weights.detector import build_trained_model
from src.weights.files import ONNX, TORCH_PROGRAM, load_checkpoint

OUTPUTS = ["boxes", "labels", "scores"]


def require(packages: Iterable[str], *, what: str) -> None:
    """Imports the packages; raises UserError, which names those that are missing or broken."""
    missing = []
    for name in packages:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise _broken_package(name, error, what) from None
            missing.append(name)
        except Exception as error:  # shared libraries that are missing or of another version raise anything
            raise _broken_package(name, error, what) from None
    if missing:
        names = " ".join(missing)
        raise UserError(f"{what} needs {' and '.join(missing)}, which this program does not: pip install {names}")


def _broken_package(name: str, error: Exception, what: str) -> UserError:
    reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    return UserError(
        f"{what} needs {name}, which is installed but cannot be imported ({reason}): "
        f"pip install --force-reinstall {name}"
    )


def load_checkpoint_or_export(path: Path) -> dict[str, Any]:
    """The state of a checkpoint (see `load_checkpoint`) or of an exported file: `categories`, `exported` (its bytes).

    Raises UserError if the file is neither.
    """
    if path.suffix == TORCH_PROGRAM:
        raise UserError(
            f"{path}: .pt2 files are not read any more: give the checkpoint itself, or detector.onnx of --mode export"
        )
    if path.suffix != ONNX:
        return load_checkpoint(path)
    require(["onnxruntime"], what=f"{path}: running it")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    detector = _open(content, path, torch.device("cpu"))
    categories = [[category["id"], category["name"]] for category in detector.categories]
    return {"categories": categories, "score_thresholds": detector.score_thresholds, "exported": content}


def build_trained_detector(
    state: dict[str, Any], *, backbone: str, num_categories: int, source: Path, device: torch.device
) -> nn.Module:
    """A checkpoint's network (see `build_trained_model`) or an exported file's detector.

    state: from `load_checkpoint_or_export(source)`.
    """
    if "exported" in state:
        return _open(state["exported"], source, device)
    return build_trained_model(state, backbone=backbone, num_categories=num_categories, source=source, device=device)


def _open(content: bytes, path: Path, device: torch.device) -> "OnnxDetector":
    try:
        detector = OnnxDetector(content, device)
    except Exception as error:  # damaged bytes make onnxruntime raise many kinds
        detail = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"{path}: is no {ONNX} file, or not a whole one ({detail})") from None
    if not detector.categories:
        raise UserError(f"{path}: is not the detector.onnx of --mode export")
    return detector


class OnnxDetector(EndToEndDetector):
    """The detector of a detector.onnx file."""

    def __init__(self, content: bytes, device: torch.device) -> None:
        import onnxruntime  # here, because it is optional

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # an error is raised too; its log line would precede ours
        wanted = ["CPUExecutionProvider"] if device.type == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
        providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
        with redirect_stdout(io.StringIO()):  # onnxruntime prints "EP Error" and tries a damaged file again
            self.session = onnxruntime.InferenceSession(content, options, providers=providers)
        is_detector = [output.name for output in self.session.get_outputs()] == OUTPUTS  # not network.onnx
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.score_thresholds = json.loads(metadata.get("score_thresholds", "null"))
        self.categories = json.loads(metadata.get("categories", "[]")) if is_detector else []

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes, labels, scores = self.session.run(OUTPUTS, {"images": images.cpu().numpy()})
        return torch.from_numpy(boxes), torch.from_numpy(labels), torch.from_numpy(scores)
