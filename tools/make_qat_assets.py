"""Make the test material of QAT formats whose libraries are not in the development environment, with the libraries.

    python tools/make_qat_assets.py modelopt    # pip install nvidia-modelopt==0.47.0
    python tools/make_qat_assets.py aimet       # pip install aimet-torch==2.42.0

Run it in an environment of its own, beside qexport. It writes into tests/qat_in/assets: of a ModelOpt checkpoint the
quantizers and ModelOpt's own state, without the weights, which are the demo detector's; of AIMET the encodings of a
small backbone, in each of its three layouts, with BatchNorm folded and not.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "tests" / "qat_in" / "assets"
IMAGES = 2


def make_modelopt() -> None:
    """Quantize the demo detector with INT8_DEFAULT_CFG, calibrated on two scenes, and save it as mto.save does."""
    import modelopt.torch.opt as mto  # noqa: PLC0415 - in an environment of its own
    import modelopt.torch.quantization as mtq  # noqa: PLC0415

    from qexport.detectors.demo.scenes import draw_scene  # noqa: PLC0415
    from qexport.detectors.load import load_detector  # noqa: PLC0415

    def look(detector: Any) -> None:
        for index in range(IMAGES):
            detector([torch.from_numpy(draw_scene(1, index).pixels).permute(2, 0, 1) / 255])

    quantized = mtq.quantize(load_detector("demo", None).module, mtq.INT8_DEFAULT_CFG, look)
    with tempfile.TemporaryDirectory() as folder:
        mto.save(quantized, f"{folder}/whole.pt")
        whole = torch.load(f"{folder}/whole.pt", weights_only=True)
    state = whole["model_state_dict"]
    whole["model_state_dict"] = {key: value for key, value in state.items() if key.endswith("._amax")}
    torch.save(whole, ASSETS / "modelopt_demo.pt")


class Backbone(nn.Module):
    """A backbone under the path that it has in the detector."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, image: Tensor) -> Tensor:
        """Return the features."""
        features: Tensor = self.backbone(image)
        return features


def make_aimet() -> None:
    """Simulate the backbone of the tests' single-level detector in int8, and export its encodings."""
    from aimet_torch.batch_norm_fold import fold_all_batch_norms  # noqa: PLC0415 - in an environment of its own
    from aimet_torch.common import quantsim  # noqa: PLC0415
    from aimet_torch.common.defs import QuantScheme  # noqa: PLC0415
    from aimet_torch.quantsim import QuantizationSimModel  # noqa: PLC0415

    sys.path.insert(0, str(ROOT / "tests"))
    detectors: Any = importlib.import_module("torchvision_detectors")
    image = torch.randn(1, 3, *detectors.FRAME_PX, generator=torch.Generator().manual_seed(3))
    for folded in (False, True):
        model = Backbone(detectors.build_single_level().backbone).eval()
        if folded:
            fold_all_batch_norms(model, image.shape, dummy_input=image)
        sim = QuantizationSimModel(
            model, image, quant_scheme=QuantScheme.min_max, default_param_bw=8, default_output_bw=8
        )
        for module in sim.model.modules():
            for quantizer in (
                *getattr(module, "input_quantizers", ()),
                *getattr(module, "output_quantizers", ()),
            ):
                if quantizer is not None:
                    quantizer.symmetric = True
        sim.compute_encodings(lambda quantized, _: quantized(image), None)
        with tempfile.TemporaryDirectory() as folder:
            for version in ("0.6.1", "1.0.0"):
                quantsim.encoding_version = version
                sim.export(folder, version, image)
                name = f"aimet_{'folded' if folded else 'plain'}_{version}"
                for kind in ("", "_torch"):
                    text = Path(folder, f"{version}{kind}.encodings").read_text()
                    (ASSETS / f"{name}{kind}.json").write_text(text)


if __name__ == "__main__":
    ASSETS.mkdir(parents=True, exist_ok=True)
    {"modelopt": make_modelopt, "aimet": make_aimet}[sys.argv[1]]()
