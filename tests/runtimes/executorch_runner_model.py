"""A `.pte` with the ports of a detector and a quantized convolution, and the artifact around it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("executorch.version", reason="executorch is not installed (the extra executorch)")

from plain_artifact import write_artifact

from qexport.artifact import TensorSite
from qexport.plugins.executorch.emission import Method, write_program
from qexport.plugins.executorch.lowering import Lowering
from qexport.plugins.executorch.operators import operators
from qexport.plugins.executorch.steps import Value
from qexport.runtimes.executorch_table import FORCED, FORWARD, PROBE, PROPOSALS

SIDE, CHANNELS, DETECTIONS, SCALE = 16, 8, 4, 1 / 16
STEM, HEAD = "backbone.body.conv1", "roi_heads.detections"
KEY = f"{STEM}@0/output:conv2d"
TENSOR = f"{STEM}/output:conv2d"
FILE_NAME = "detector.int8.pte"


class Network:
    """Frame in, boxes, scores, labels and count out, through one convolution of int8 codes."""

    def __init__(self, *, side: int = SIDE, detections: int = DETECTIONS, seed: int = 0) -> None:
        # A graph of its own is not needed: what the lowering writes with is.
        graph = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
        lowering = Lowering(graph, operators())
        self.steps, self._xnnpack, self._kernels = lowering.steps, lowering.xnnpack, lowering.kernels
        self._random = torch.Generator().manual_seed(seed)
        self.frame = self.steps.input("frame", (side, side, 3), "uint8", 1.0)
        self.steps.site = "preprocess"
        image = self._xnnpack.reshape(self._xnnpack.convert(self.frame, None), (1, side, side, 3))
        self.image = self._xnnpack.convert(image, 2.0)
        self.steps.site = STEM
        self.codes = self.stem(self.image)
        self.steps.site = HEAD
        self.outputs = self._detect(self.codes, detections)

    def stem(self, image: Value) -> Value:
        """Return the codes of the convolution, (1, H, W, C)."""
        weight = torch.randint(-127, 128, (CHANNELS, 3, 3, 3), generator=self._random, dtype=torch.int8)
        scales = torch.full((CHANNELS,), 1 / 4096)
        bias = torch.zeros(CHANNELS, dtype=torch.int32)
        weights = [self.steps.constant(one) for one in (weight, bias, scales, scales * 2.0)]
        return self._xnnpack.convolution(
            image, weights, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, channels=CHANNELS,
            scale=SCALE, limits=(0.0, None),
        )  # fmt: skip

    def _detect(self, codes: Value, detections: int) -> dict[str, Value]:
        build, xnnpack = self._kernels, self._xnnpack
        mean = xnnpack.mean(xnnpack.convert(codes, None))
        ranked, index = self.steps.kernel(torch.topk, build.reshape(mean, [CHANNELS]), detections)
        boxes = build.expand(build.reshape(ranked, [detections, 1]), [detections, 4])
        found = build.call(torch.gt, ranked, 0.0)
        return {
            "boxes": boxes,
            "scores": build.call(torch.clamp, ranked, 0.0, 1.0),
            "labels": build.call(torch.add, build.call(torch.remainder, index, 3), 1),
            "count": build.call(torch.sum, found, [0], False),
        }

    def proposals(self) -> Value:
        """Return something of the right type."""
        return self._kernels.call(torch.mul, self.outputs["boxes"], 1.0)


def make_program(*, side: int = SIDE, detections: int = DETECTIONS) -> bytes:
    """Return the network as a program of three methods."""
    network = Network(side=side, detections=detections)
    forced = Network(side=side, detections=detections)
    given = forced.steps.input(PROPOSALS, (detections, 4), "float32")
    del given
    inner = {TENSOR: network.codes, PROPOSALS: network.proposals()}
    return write_program(
        {
            FORWARD: Method(network.steps, network.outputs),
            PROBE: Method(network.steps, network.outputs | inner),
            FORCED: Method(forced.steps, {KEY: forced.codes}),
        }
    ).data


def make_artifact(folder: Path, data: bytes) -> Path:
    """Write an artifact with this program; return its folder."""
    (folder / FILE_NAME).write_bytes(data)
    write_artifact(
        folder,
        target="executorch",
        files={"int8": FILE_NAME},
        frame_px=(SIDE, SIDE),
        detections=DETECTIONS,
        sites=(
            TensorSite(
                key=KEY,
                tensor=TENSOR,
                zero_point=0,
                shape=(1, CHANNELS, SIDE, SIDE),
                stored_shape=(1, SIDE, SIDE, CHANNELS),
                stored_order=(0, 3, 1, 2),
            ),
        ),
        float_sites={PROPOSALS: PROPOSALS},
    )
    return folder
