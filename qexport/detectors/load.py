"""From what the user gives (a factory and a checkpoint) to a detector that the other stages can trust.

A source names the factory: `path/to/file.py:function`, `package.module:function`, `torchvision:NAME`, `demo`.
Loading a factory runs the user's code (`factory.py`). Weights are only read, never executed (`weights.py`).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.resnet import BasicBlock, Bottleneck

from qexport.detectors.demo import demo_weights
from qexport.detectors.demo import model as demo_model
from qexport.detectors.factory import build_from_file, build_from_package
from qexport.detectors.weights import apply_weights, check_finite, load_weights
from qexport.errors import CheckpointError
from qexport.files import sha256_file

BACKGROUND = "__background__"

_FORMS = "path/to/file.py:function, package.module:function, torchvision:NAME or demo"
_BACKGROUND_NAMES = (BACKGROUND, "background", "bg")
# torchvision's ResNets by block and blocks per layer; a trunk that is cut short matches by its first layers.
_RESNETS = (
    (BasicBlock, (2, 2, 2, 2), 18),
    (BasicBlock, (3, 4, 6, 3), 34),
    (Bottleneck, (3, 4, 6, 3), 50),
    (Bottleneck, (3, 4, 23, 3), 101),
    (Bottleneck, (3, 8, 36, 3), 152),
)
_LARGE_MOBILENET_V3_BLOCKS = 15


@dataclass(frozen=True, slots=True)
class LoadedDetector:
    """A two-stage detector, ready to be made static.

    module: in eval mode, float32 on the CPU, no parameter requires a gradient.
    source: what the user gave, `model.py:build`.
    labels: class names by label; `labels[0]` is `__background__`.
    num_classes: with the background.
    weights_sha256: digest of the weights file; None where there is none.
    random_weights: no weights file was given, so the values are those that the factory left behind.
    backbone: short name for tables, `resnet18-fpn`.
    """

    module: GeneralizedRCNN
    source: str
    labels: tuple[str, ...]
    num_classes: int
    weights_sha256: str | None
    random_weights: bool
    backbone: str

    @property
    def named_labels(self) -> bool:
        """Tell whether the classes have names of their own, not numbers."""
        return self.labels[1:] != _numbered(self.num_classes)[1:]


def load_detector(source: str, weights: Path | None, *, seed: int = 0) -> LoadedDetector:
    """Build the detector that `source` names and load `weights` into it.

    A factory file or package is the user's own code and is run, with the rights of this process. While it
    runs, the file's folder (for a package: the current folder) can be imported from; afterwards `sys.path`
    is as before, and `sys.modules` has forgotten what came from that folder.

    Args:
        source: `path/to/file.py:function`, `package.module:function`, `torchvision:NAME` (a builder of
            torchvision.models.detection, with its 91 COCO labels) or `demo`. The function takes no arguments.
        weights: the checkpoint; None leaves the weights that the factory made (`random_weights`), for
            `demo` it means the demo's own.
        seed: of torch's random numbers while the factory runs; the caller's random state is kept.

    Raises:
        CheckpointError: the factory is missing, fails, needs arguments or gives something that is not a
            torchvision Faster R-CNN; the weights cannot be read or do not fit.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        built, classes = _build(source)
    module = _check_two_stage(built, source).cpu().float().eval().requires_grad_(False)
    if weights is None and source == "demo":
        weights = demo_weights()
    digest = None
    if weights is None:
        check_finite(module.state_dict(), source)
    else:
        apply_weights(module, load_weights(weights), source=str(weights))
        digest = sha256_file(weights)
        restore_published_eps(module, source, digest)
    num_classes = module.roi_heads.box_predictor.cls_score.out_features
    return LoadedDetector(
        module=module,
        source=source,
        labels=_labels(classes, num_classes),
        num_classes=num_classes,
        weights_sha256=digest,
        random_weights=weights is None,
        backbone=name_backbone(module.backbone),
    )


def name_backbone(backbone: nn.Module) -> str:
    """Return a short name, `resnet18-fpn`, as well as the module tells it."""
    has_fpn = isinstance(backbone, BackboneWithFPN)
    body = backbone.get_submodule("body") if has_fpn else backbone
    blocks = [block for block in body.modules() if type(block).__module__.startswith("torchvision.models.")]
    families = [type(block).__module__.rpartition(".")[2] for block in blocks]
    families = [family for family in families if not family.endswith("_utils")]
    family = families[0] if families else type(body).__name__.lower()
    if family == "resnet":
        family = _name_resnet(body)
    elif family == "mobilenetv3":
        residuals = sum(type(block).__name__ == "InvertedResidual" for block in blocks)
        size = "large" if residuals >= _LARGE_MOBILENET_V3_BLOCKS else "small"
        family = f"mobilenet-v3-{size}"
    return f"{family}-fpn" if has_fpn else family


def _name_resnet(body: nn.Module) -> str:
    layers = [layer for name, layer in body.named_modules() if re.fullmatch(r"(.*\.)?layer[1-4]", name)]
    depths = tuple(len(list(layer.children())) for layer in layers)
    first = next((block for block in body.modules() if isinstance(block, (BasicBlock, Bottleneck))), None)
    if first is None or not depths:
        return "resnet"
    groups, channels = first.conv2.groups, first.conv2.out_channels
    for block, blocks, number in _RESNETS:
        if isinstance(first, block) and depths == blocks[: len(depths)]:
            if groups > 1:
                return f"resnext{number}-{groups}x{channels // groups}d"
            return {64: f"resnet{number}", 128: f"wide-resnet{number}"}.get(channels, "resnet")
    return "resnet"


def _build(source: str) -> tuple[object, object]:
    """Return what the factory gives, and the class names beside it (None where there are none)."""
    if source == "demo":
        return demo_model.build(), demo_model.CLASSES
    place, _, name = source.rpartition(":")
    if not place or not name:
        hint = f" For this file: {source.rstrip(':')}:build." if source.rstrip(":").endswith(".py") else ""
        raise CheckpointError(f"{source!r} names no detector: expected {_FORMS}.{hint}")
    if place == "torchvision":
        return _build_torchvision(name), FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    if place.endswith(".py"):
        return build_from_file(Path(place), name, source)
    return build_from_package(place, name, source)


def _build_torchvision(name: str) -> object:
    known = torchvision.models.list_models(module=torchvision.models.detection)
    usable = [builder for builder in known if builder.startswith("fasterrcnn_")]
    if name in usable:
        return torchvision.models.get_model_builder(name)(weights=None, weights_backbone=None)
    if name in known:
        raise CheckpointError(
            f"torchvision:{name}: {_why_not_faster_rcnn(name.partition('_')[0])} "
            f"Expected one of {', '.join(usable)}."
        )
    close = difflib.get_close_matches(name, usable, n=2, cutoff=0.5)
    meant = f" Did you mean {' or '.join(close)}?" if close else ""
    raise CheckpointError(
        f"torchvision:{name}: torchvision {torchvision.__version__} has no detector of this name.{meant} "
        f"It has {', '.join(usable)}."
    )


def _check_two_stage(built: object, source: str) -> GeneralizedRCNN:
    """Refuse everything but torchvision's Faster R-CNN."""
    expected = "Expected a torchvision Faster R-CNN (GeneralizedRCNN: transform, backbone, rpn, roi_heads)."
    if built is None:
        raise CheckpointError(f"{source}: the factory returned None; is its `return` missing? {expected}")
    if not isinstance(built, nn.Module):
        raise CheckpointError(
            f"{source}: the factory returned a {type(built).__name__}, not a torch module. {expected}"
        )
    kind = type(built).__name__
    if not isinstance(built, GeneralizedRCNN):
        raise CheckpointError(f"{source}: {kind}: {_why_not_faster_rcnn(kind)} {expected}")
    heads = built.roi_heads
    if heads.has_mask() or heads.has_keypoint():
        raise CheckpointError(
            f"{source}: {kind}: {_why_not_faster_rcnn('mask' if heads.has_mask() else 'keypoint')}"
        )
    score, boxes = (getattr(heads.box_predictor, key, None) for key in ("cls_score", "bbox_pred"))
    if not isinstance(score, nn.Linear) or not isinstance(boxes, nn.Linear):
        raise CheckpointError(
            f"{source}: roi_heads.box_predictor is a {type(heads.box_predictor).__name__} without linear "
            "layers cls_score and bbox_pred. Use torchvision's FastRCNNPredictor."
        )
    if boxes.out_features != 4 * score.out_features:
        raise CheckpointError(
            f"{source}: roi_heads.box_predictor.bbox_pred has {boxes.out_features} outputs, expected four "
            f"for each of the {score.out_features} classes. Class-agnostic boxes are not supported: use "
            "FastRCNNPredictor."
        )
    return built


def _why_not_faster_rcnn(kind: str) -> str:
    """Say why a family of detectors is refused; `kind` is its class or the first word of its builder."""
    lower = kind.lower()
    if any(family in lower for family in ("retinanet", "ssd", "fcos", "yolo")):
        return "a one-stage detector; qexport takes two-stage detectors."
    if "mask" in lower or "keypoint" in lower:
        branch = "mask" if "mask" in lower else "keypoint"
        return (
            f"has a {branch} branch, which qexport cannot export. Train and give a Faster R-CNN without it."
        )
    if lower in {"dataparallel", "distributeddataparallel", "optimizedmodule"}:
        return "a wrapper; return the detector inside it."
    return "has no two stages as torchvision builds them."


def restore_published_eps(module: GeneralizedRCNN, source: str, digest: str) -> None:
    """Give torchvision's published COCO_V1 weights the BatchNorm epsilon that they were trained with.

    torchvision itself sets 0 when it loads this one file (its `overwrite_eps`, after pytorch/vision#2933).
    The file's name ends in the first digits of its digest.
    """
    published = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.url.rpartition("-")[2].removesuffix(".pth")
    if source == "torchvision:fasterrcnn_resnet50_fpn" and digest.startswith(published):
        for layer in module.backbone.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eps = 0.0


def _labels(classes: object, num_classes: int) -> tuple[str, ...]:
    """Return names for labels 0 and above: the factory's where they fit, numbers otherwise."""
    if isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes):
        if len(classes) == num_classes - 1:
            return (BACKGROUND, *classes)
        if len(classes) == num_classes and classes[0].lower() in _BACKGROUND_NAMES:
            return (BACKGROUND, *classes[1:])
    return _numbered(num_classes)


def _numbered(num_classes: int) -> tuple[str, ...]:
    return (BACKGROUND, *(f"class {label}" for label in range(1, num_classes)))
