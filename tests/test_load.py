"""What the user gives, good and bad: factories, checkpoints, and a message for each mistake."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_small
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone

from qexport.detectors.demo import demo_weights
from qexport.detectors.load import LoadedDetector, load_detector, name_backbone, restore_published_eps
from qexport.detectors.weights import apply_weights, load_weights
from qexport.errors import CheckpointError
from qexport.files import sha256_file

REAL = Path(__file__).parents[2] / "shared" / "models" / "bccd_resnet18_fpn"

TINY = """
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

CLASSES = ["__background__", "screw", "nut"]


def parts(num_classes=3):
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    backbone.out_channels = 4
    return backbone, dict(
        min_size=32,
        max_size=32,
        rpn_anchor_generator=AnchorGenerator(((16,),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 2, 0),
        box_head=TwoMLPHead(16, 8),
        box_predictor=FastRCNNPredictor(8, num_classes),
    )


def build():
    backbone, rest = parts()
    return FasterRCNN(backbone, **rest)
"""


def write_factory(folder: Path, text: str = "", name: str = "model.py") -> str:
    """Write the tiny factory with `text` after it; return the source `FILE:build`."""
    path = folder / name
    path.write_text(TINY + text)
    return f"{path}:build"


def message_of(call: Callable[[], object]) -> str:
    """Return the message of the CheckpointError that the call must raise."""
    with pytest.raises(CheckpointError) as caught:
        call()
    return str(caught.value)


@pytest.fixture
def tiny(tmp_path: Path) -> LoadedDetector:
    return load_detector(write_factory(tmp_path), None)


@pytest.fixture
def state(tiny: LoadedDetector) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return {
        key: torch.rand_like(value) if value.is_floating_point() else value
        for key, value in tiny.module.state_dict().items()
    }


def save(value: object, path: Path) -> Path:
    torch.save(value, path)
    return path


# --- factories ---------------------------------------------------------------------------------------


def test_load_factory_file_gives_frozen_eval_detector(tmp_path: Path) -> None:
    loaded = load_detector(write_factory(tmp_path), None)
    assert loaded.labels == ("__background__", "screw", "nut")
    assert loaded.num_classes == 3
    assert (loaded.random_weights, loaded.weights_sha256) == (True, None)
    assert not any(part.training for part in loaded.module.modules())
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    (found,) = loaded.module([torch.rand(3, 32, 32)])
    assert set(found) == {"boxes", "labels", "scores"}


def test_load_factory_of_half_precision_gives_float32(tmp_path: Path) -> None:
    source = write_factory(tmp_path, "\n\ndef half():\n    return build().half()\n")
    loaded = load_detector(source.replace(":build", ":half"), None)
    assert {parameter.dtype for parameter in loaded.module.parameters()} == {torch.float32}


def test_load_factory_with_same_seed_repeats_and_keeps_callers_random_state(tmp_path: Path) -> None:
    source = write_factory(tmp_path)
    before = torch.random.get_rng_state()
    first, again, other = (load_detector(source, None, seed=seed).module.state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["backbone.0.weight"], other["backbone.0.weight"])


def test_load_factory_with_sibling_module_leaves_interpreter_clean(tmp_path: Path) -> None:
    for number, folder in enumerate((tmp_path / "one", tmp_path / "two")):
        folder.mkdir()
        (folder / "sibling_of_model.py").write_text(f"CLASSES = ['part {number}', 'rest']\n")
        source = write_factory(folder, "from sibling_of_model import CLASSES\n")
        path, modules = list(sys.path), set(sys.modules)
        assert load_detector(source, None).labels[1] == f"part {number}"
        assert sys.path == path
        assert set(sys.modules) == modules


def test_load_factory_that_fails_leaves_interpreter_clean(tmp_path: Path) -> None:
    source = write_factory(tmp_path, "raise RuntimeError\n")
    path, modules = list(sys.path), set(sys.modules)
    message_of(lambda: load_detector(source, None))
    assert sys.path == path
    assert set(sys.modules) == modules


def test_load_factory_from_package_in_current_folder_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parts_of_ours").mkdir()
    write_factory(tmp_path / "parts_of_ours", name="detector.py")
    monkeypatch.chdir(tmp_path)
    loaded = load_detector("parts_of_ours.detector:build", None)
    assert loaded.labels == ("__background__", "screw", "nut")
    assert "parts_of_ours" not in sys.modules


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        ("('screw', 'nut')", ("__background__", "screw", "nut")),
        ("['background', 'screw', 'nut']", ("__background__", "screw", "nut")),
        ("['screw', 'nut', 'bolt']", ("__background__", "class 1", "class 2")),
        ("['screw']", ("__background__", "class 1", "class 2")),
        ("{1: 'screw', 2: 'nut'}", ("__background__", "class 1", "class 2")),
        ("None", ("__background__", "class 1", "class 2")),
    ],
)
def test_load_labels_are_classes_where_they_fit(
    tmp_path: Path, classes: str, labels: tuple[str, ...]
) -> None:
    assert load_detector(write_factory(tmp_path, f"CLASSES = {classes}\n"), None).labels == labels


BAD_FACTORIES = {
    "none": ("def build():\n    parts()\n", "returned None; is its `return` missing"),
    "text": ("def build():\n    return 'detector'\n", "returned a str, not a torch module"),
    "class": ("build = 3\n", "build is a int, expected a function"),
    "instance": ("build = build()\n", "build is a FasterRCNN, expected a function without arguments"),
    "arguments": (
        "def build(depth, width=1, *rest, **more): ...\n",
        "build(depth, width=1, *rest, **more) needs depth",
    ),
    "raises": ("def build():\n    return 1 // 0\n", "raised ZeroDivisionError: "),
    "exits": ("raise SystemExit('usage: model.py')\n", "raised SystemExit: usage: model.py"),
    "import": ("import timm_of_nobody\n", "Install timm_of_nobody in this environment"),
    "syntax": ("def build(:\n", "syntax error in "),
    "plain module": ("def build():\n    return nn.Linear(2, 2)\n", "Linear: has no two stages"),
    "parallel": (
        "whole = build\ndef build():\n    return nn.DataParallel(whole())\n",
        "a wrapper; return the detector",
    ),
    "retinanet": (
        "def build():\n    anchors = AnchorGenerator(((8,),), ((1.0,),))\n"
        "    return RetinaNet(parts()[0], 3, anchor_generator=anchors)\n",
        "RetinaNet: a one-stage detector",
    ),
    "mask": (
        "def build():\n    backbone, rest = parts()\n    pool = MultiScaleRoIAlign(['0'], 2, 0)\n"
        "    return MaskRCNN(backbone, **rest, mask_roi_pool=pool, mask_predictor=nn.Identity())\n",
        "MaskRCNN: has a mask branch, which qexport cannot export",
    ),
    "predictor": (
        "whole = build\ndef build():\n    made = whole()\n    made.roi_heads.box_predictor = nn.Identity()\n"
        "    return made\n",
        "box_predictor is a Identity without linear layers cls_score and bbox_pred",
    ),
    "class-agnostic": (
        "whole = build\ndef build():\n    made = whole()\n"
        "    made.roi_heads.box_predictor.bbox_pred = nn.Linear(8, 4)\n    return made\n",
        "bbox_pred has 4 outputs, expected four for each of the 3 classes",
    ),
    "nan": (
        "whole = build\ndef build():\n    made = whole()\n"
        "    nn.init.constant_(made.rpn.head.cls_logits.bias, float('nan'))\n    return made\n",
        "rpn.head.cls_logits.bias (1)",
    ),
}


@pytest.mark.parametrize("case", sorted(BAD_FACTORIES))
def test_load_bad_factory_raises_what_is_wrong(tmp_path: Path, case: str) -> None:
    text, said = BAD_FACTORIES[case]
    source = write_factory(tmp_path, "\n\n" + text)
    message = message_of(lambda: load_detector(source, None))
    assert said in message
    assert message.startswith(source)


def test_load_factory_that_raises_shows_last_line_of_users_file(tmp_path: Path) -> None:
    source = write_factory(tmp_path, "\n\ndef build():\n    return nn.Linear(2, -1)\n")
    message = message_of(lambda: load_detector(source, None))
    line = TINY.count("\n") + 4
    assert f"model.py, line {line}, in build: return nn.Linear(2, -1)" in message


def test_load_factory_without_that_function_lists_the_files_functions(tmp_path: Path) -> None:
    source = write_factory(tmp_path).replace(":build", ":biuld")
    message = message_of(lambda: load_detector(source, None))
    assert "no function 'biuld'" in message
    assert "It has parts, build." in message


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere/model.py:build", "nowhere/model.py: no such factory file"),
        ("nowhere/model.py", "For this file: nowhere/model.py:build"),
        ("yolo", "'yolo' names no detector: expected path/to/file.py:function"),
        (":build", "names no detector"),
        ("no_such_package.model:build", "there is no Python module 'no_such_package.model'"),
        ("..:build", "there is no Python module '..'"),
        ("json.nothing:build", "there is no Python module 'json.nothing'"),
        (
            "torchvision:fasterrcnn_resnet_50_fpn",
            "Did you mean fasterrcnn_resnet50_fpn or fasterrcnn_resnet50_fpn_v2?",
        ),
        ("torchvision:frcnn", "It has fasterrcnn_mobilenet_v3_large_320_fpn, "),
        ("torchvision:retinanet_resnet50_fpn", "a one-stage detector"),
        ("torchvision:ssd300_vgg16", "a one-stage detector"),
        ("torchvision:fcos_resnet50_fpn", "a one-stage detector"),
        ("torchvision:maskrcnn_resnet50_fpn", "has a mask branch"),
        ("torchvision:keypointrcnn_resnet50_fpn", "has a keypoint branch"),
    ],
)
def test_load_source_that_names_nothing_usable_raises(source: str, said: str) -> None:
    assert said in message_of(lambda: load_detector(source, None))


def test_load_torchvision_builder_has_coco_labels() -> None:
    loaded = load_detector("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", None)
    assert loaded.labels == tuple(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
    assert (loaded.num_classes, loaded.random_weights) == (91, True)
    assert loaded.backbone == "mobilenet-v3-large-fpn"


@pytest.mark.parametrize(
    ("name", "digest", "eps"),
    [
        ("fasterrcnn_resnet50_fpn", "258fb6c6" + "0" * 56, 0.0),
        ("fasterrcnn_resnet50_fpn", "0" * 64, 1e-5),
        ("fasterrcnn_resnet50_fpn_v2", "258fb6c6" + "0" * 56, 1e-5),
    ],
)
def test_published_coco_weights_alone_have_epsilon_zero(
    tiny: LoadedDetector, name: str, digest: str, eps: float
) -> None:
    # The published file cannot be downloaded here; torchvision's file name holds the digest that is matched.
    restore_published_eps(tiny.module, f"torchvision:{name}", digest)
    assert tiny.module.backbone[1].eps == eps


@pytest.mark.skipif(
    not demo_weights().is_file(), reason="the demo detector's weights are not in this checkout"
)
def test_load_demo_has_its_own_weights() -> None:
    loaded = load_detector("demo", None)
    assert loaded.weights_sha256 == sha256_file(demo_weights())
    assert not loaded.random_weights
    assert loaded.labels == ("__background__", "washer", "nut", "bolt")


@pytest.mark.skipif(not REAL.is_dir(), reason="shared/models/bccd_resnet18_fpn is not beside the repository")
def test_load_real_detector_has_its_labels_and_weights() -> None:
    weights = REAL / "weights_fp16.pt"
    loaded = load_detector(f"{REAL}/model.py:build", weights)
    assert loaded.labels == ("__background__", "RBC", "WBC", "Platelets")
    assert (loaded.num_classes, loaded.backbone, loaded.random_weights) == (4, "resnet18-fpn", False)
    assert loaded.weights_sha256 == sha256_file(weights)
    saved = torch.load(weights, weights_only=True)
    own = loaded.module.state_dict()
    assert all(torch.equal(own[key], value.to(own[key].dtype)) for key, value in saved.items())
    assert {value.dtype for value in own.values() if value.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: resnet_fpn_backbone(backbone_name="resnet34", weights=None), "resnet34-fpn"),
        (lambda: resnet_fpn_backbone(backbone_name="resnext50_32x4d", weights=None), "resnext50-32x4d-fpn"),
        (lambda: resnet_fpn_backbone(backbone_name="wide_resnet50_2", weights=None), "wide-resnet50-fpn"),
        (
            lambda: resnet_fpn_backbone(
                backbone_name="resnet18", weights=None, returned_layers=[1, 2], trainable_layers=5
            ),
            "resnet18-fpn",
        ),
        (
            lambda: mobilenet_backbone(backbone_name="mobilenet_v3_small", weights=None, fpn=True),
            "mobilenet-v3-small-fpn",
        ),
        (lambda: mobilenet_v3_small(weights=None).features, "mobilenet-v3-small"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), "sequential"),
    ],
)
def test_name_backbone_of_known_trunk_is_its_name(build: Callable[[], nn.Module], name: str) -> None:
    assert name_backbone(build()) == name


# --- reading checkpoints -----------------------------------------------------------------------------


def test_load_weights_then_detector_has_exactly_them(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = save(state, tmp_path / "weights.pt")
    loaded = load_detector(f"{tmp_path}/model.py:build", path)
    assert all(torch.equal(value, state[key]) for key, value in loaded.module.state_dict().items())
    assert (loaded.random_weights, loaded.weights_sha256) == (False, sha256_file(path))


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "ema", "net", "our_detector"])
def test_load_weights_under_a_key_beside_training_state_succeeds(
    tmp_path: Path, state: dict[str, Tensor], key: str
) -> None:
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    path = save(
        {"epoch": 3, key: state, "optimizer": optimizer, "loss": torch.tensor(0.5)}, tmp_path / "w.pth"
    )
    assert same(load_weights(path), state)


def test_load_weights_under_usual_key_beside_other_tensors_takes_the_usual(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    path = save({"metrics": {"loss": torch.tensor(0.5)}, "state_dict": state}, tmp_path / "w.pt")
    assert same(load_weights(path), state)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod."])
def test_load_weights_with_prefix_on_all_keys_strips_it(
    tmp_path: Path, state: dict[str, Tensor], prefix: str
) -> None:
    path = save({prefix + key: value for key, value in state.items()}, tmp_path / "w.pt")
    assert same(load_weights(path), state)


def test_load_weights_with_prefix_on_some_keys_keeps_it(tmp_path: Path) -> None:
    mixed = {"module.a": torch.ones(2), "b": torch.ones(2)}
    assert same(load_weights(save(mixed, tmp_path / "w.pt")), mixed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_load_weights_of_other_precision_gives_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    path = save({"a": torch.tensor([0.5, -2.0], dtype=dtype), "n": torch.tensor(3)}, tmp_path / "w.pt")
    assert same(load_weights(path), {"a": torch.tensor([0.5, -2.0]), "n": torch.tensor(3)})


def test_load_weights_of_safetensors_and_legacy_torch_agree(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert same(load_weights(tmp_path / "w.safetensors"), state)
    assert same(load_weights(tmp_path / "w.pt"), state)


class RunsCode:
    """Unpickled the usual way, creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("zipped", [True, False])
def test_load_weights_that_run_code_are_refused_unrun(tmp_path: Path, zipped: bool) -> None:
    made = tmp_path / "made by the checkpoint"
    path = tmp_path / "w.pt"
    torch.save({"a": torch.ones(2), "b": RunsCode(made)}, path, _use_new_zipfile_serialization=zipped)
    message = message_of(lambda: load_weights(path))
    assert re.search(r"the file wants to run code: .*(posix|nt)\.mkdir", message)
    assert "torch.save(model.state_dict()" in message
    assert not made.exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_load_weights_of_plain_pickle_is_refused_unrun(tmp_path: Path, protocol: int) -> None:
    made = tmp_path / "made by the checkpoint"
    path = tmp_path / "w.pt"
    path.write_bytes(pickle.dumps({"a": RunsCode(made)}, protocol=protocol))
    assert "a Python pickle, which can run code" in message_of(lambda: load_weights(path))
    assert not made.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings(
    "ignore:Couldn't retrieve source code"
)  # the old format keeps it beside the module
def test_load_weights_of_whole_pickled_module_says_so(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "w.pt"
    torch.save({"model": nn.Sequential(nn.Linear(2, 2))}, path, _use_new_zipfile_serialization=zipped)
    message = message_of(lambda: load_weights(path))
    assert "a whole pickled model (torch.nn.modules." in message
    assert "--model file.py:function" in message


def test_load_weights_with_training_arguments_names_the_object(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    path = save({"model": state, "args": argparse.Namespace(lr=0.1)}, tmp_path / "w.pt")
    assert "beside tensors it holds argparse.Namespace" in message_of(lambda: load_weights(path))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_load_weights_of_torchscript_says_so(tmp_path: Path) -> None:
    traced = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))  # type: ignore[no-untyped-call]
    traced.save(str(tmp_path / "w.pt"))
    assert "a TorchScript archive" in message_of(lambda: load_weights(tmp_path / "w.pt"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty (0 bytes)"),
        (b"epoch 1: loss 0.5\n" * 100, "a text file, not weights (it begins 'epoch 1: loss"),
        ("Gewichte für Zähler\n".encode() * 40, "a text file, not weights"),
        (b"h", "a text file, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html></html>", "a web page, not weights"),
        (bytes(range(8, 200)), "not a weights file (it begins with bytes 08 09 0a"),
        (b"PK\x03\x04" + bytes(100), "damaged or cut short (104 bytes"),
    ],
)
def test_load_weights_of_other_content_says_what_it_is(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    message = message_of(lambda: load_weights(path))
    assert said in message
    assert message.startswith(f"{path}: ")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WebP"])
def test_load_weights_of_image_says_so(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "w.pt"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path, format=kind)
    assert f"a {kind} image, not weights" in message_of(lambda: load_weights(path))


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_load_weights_of_truncated_checkpoint_raises(
    tmp_path: Path, state: dict[str, Tensor], kind: str, share: float
) -> None:
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert "damaged or cut short" in message_of(lambda: load_weights(path))


def test_load_weights_of_safetensors_cut_in_first_bytes_raises(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"\x10\x00\x00")
    assert "not a safetensors file, or cut short" in message_of(lambda: load_weights(path))


def test_load_weights_of_missing_file_or_folder_raises(tmp_path: Path) -> None:
    assert "no such weights file" in message_of(lambda: load_weights(tmp_path / "w.pt"))
    assert "a folder; give the weights file in it" in message_of(lambda: load_weights(tmp_path))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"epoch": 3, "loss": torch.tensor(0.5)}, "holds no state dict: 1 of 2 entries are tensors"),
        ({}, "holds no state dict: 0 of 0 entries are tensors"),
        ([torch.ones(2)], "holds a list, expected a state dict"),
        (torch.ones(2), "holds a Tensor, expected a state dict"),
        ({"model": {"a": torch.ones(2)}, "ema": {"a": torch.ones(2)}}, "holds 2 state dicts (model, ema)"),
        ({"g": {"a": torch.ones(2)}, "d": {"a": torch.ones(2)}}, "holds 2 state dicts (g, d)"),
        ({"a": torch.ones(2).to_sparse()}, "a is a sparse tensor"),
    ],
)
def test_load_weights_without_one_state_dict_says_what_is_there(
    tmp_path: Path, value: object, said: str
) -> None:
    assert said in message_of(lambda: load_weights(save(value, tmp_path / "w.pt")))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # torch is about to drop what is refused here
def test_load_weights_already_quantized_are_refused(tmp_path: Path) -> None:
    path = save({"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, tmp_path / "w.pt")
    assert "a is a quantized tensor, expected dense float weights" in message_of(lambda: load_weights(path))


def test_load_weights_with_nan_names_tensors_and_counts(tmp_path: Path, state: dict[str, Tensor]) -> None:
    state["backbone.0.weight"][0, 0, 0, :2] = float("nan")
    state["rpn.head.cls_logits.bias"][0] = float("inf")
    message = message_of(lambda: load_weights(save(state, tmp_path / "w.pt")))
    assert f"3 weights are NaN or infinite, in 2 of {len(state)} tensors" in message
    assert "backbone.0.weight (2), rpn.head.cls_logits.bias (1)" in message


# --- putting them in ---------------------------------------------------------------------------------


def refuse(tiny: LoadedDetector, state: dict[str, Tensor]) -> str:
    """Return why the weights are refused; the detector must be as it was."""
    before = {key: value.clone() for key, value in tiny.module.state_dict().items()}
    message = message_of(lambda: apply_weights(tiny.module, state, source="w.pt"))
    assert same(tiny.module.state_dict(), before)
    assert message.startswith("w.pt: ")
    return message


def test_apply_weights_without_counters_of_batchnorm_succeeds(
    tiny: LoadedDetector, state: dict[str, Tensor]
) -> None:
    fewer = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert len(fewer) == len(state) - 1
    fewer["backbone.9.num_batches_tracked"] = torch.tensor(5)
    apply_weights(tiny.module, fewer, source="w.pt")
    assert torch.equal(tiny.module.state_dict()["backbone.0.weight"], state["backbone.0.weight"])


def test_apply_weights_with_keys_of_earlier_torchvision_succeeds(
    tiny: LoadedDetector, state: dict[str, Tensor]
) -> None:
    old = {key.replace("rpn.head.conv.0.0.", "rpn.head.conv."): value for key, value in state.items()}
    assert "rpn.head.conv.weight" in old
    apply_weights(tiny.module, old, source="w.pt")
    assert same(tiny.module.state_dict(), state)


def test_apply_weights_with_missing_and_unexpected_keys_lists_both(
    tiny: LoadedDetector, state: dict[str, Tensor]
) -> None:
    state["roi_heads.extra"] = state.pop("roi_heads.box_head.fc6.bias")
    message = refuse(tiny, state)
    assert "1 missing: roi_heads.box_head.fc6.bias" in message
    assert "1 unexpected: roi_heads.extra" in message


def test_apply_weights_with_wrong_shape_shows_both_shapes(
    tiny: LoadedDetector, state: dict[str, Tensor]
) -> None:
    state["roi_heads.box_head.fc7.bias"] = torch.ones(9)
    assert "1 wrong shape: roi_heads.box_head.fc7.bias (9,), expected (8,)" in refuse(tiny, state)


def test_apply_weights_of_other_classes_says_the_counts(
    tiny: LoadedDetector, state: dict[str, Tensor]
) -> None:
    predictor = "roi_heads.box_predictor"
    state |= {
        f"{predictor}.cls_score.weight": torch.ones(21, 8),
        f"{predictor}.cls_score.bias": torch.ones(21),
    }
    state |= {
        f"{predictor}.bbox_pred.weight": torch.ones(84, 8),
        f"{predictor}.bbox_pred.bias": torch.ones(84),
    }
    message = refuse(tiny, state)
    assert "the weights are for 21 classes, the detector has 3" in message
    assert "num_classes=21" in message
    assert f"4 wrong shape: {predictor}.cls_score.weight (21, 8), expected (3, 8)" in message


def test_apply_weights_of_other_architecture_says_so_and_shortens_lists(tiny: LoadedDetector) -> None:
    other = resnet_fpn_backbone(backbone_name="resnet18", weights=None).state_dict()
    message = refuse(tiny, other)
    total = len(tiny.module.state_dict())
    assert f"another architecture: 0 of the detector's {total} tensors fit" in message
    assert re.search(r"unexpected: (\S+, ){10}and \d+ more", message)
