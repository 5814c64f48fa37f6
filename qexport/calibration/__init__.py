"""Images to encodings."""

from __future__ import annotations

import qexport.quantization  # noqa: F401 - before torchao: it keeps one of its messages from the screen
