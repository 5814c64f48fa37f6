"""From a finished run to a bundle for a board. Works on the workstation; what reads a bundle is `qexport.bundle`."""

from __future__ import annotations

from qexport.bundling.write import WrittenBundle, write_bundle

__all__ = ["WrittenBundle", "write_bundle"]
