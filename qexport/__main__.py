"""`python -m qexport`: the same as `qexport`."""

from __future__ import annotations

from qexport.cli import main

if __name__ == "__main__":
    main()
