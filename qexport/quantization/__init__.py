"""The quantized graph: built from a static detector and a table of encodings, the same bits every time."""

from __future__ import annotations

import logging


def _is_news(record: logging.LogRecord) -> bool:
    # torchao registers an enum in a way that torch will one day refuse; nothing that a user could change.
    return "is an Enum subclass" not in record.msg


# Every file that imports torchao lies in this package, or imports it first.
logging.getLogger("torch.utils._pytree").addFilter(_is_news)
