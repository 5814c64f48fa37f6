"""What is installed here, what of it fits together, and what to install: `qexport doctor`."""

from __future__ import annotations

from qexport.doctor.examination import examine
from qexport.doctor.findings import Diagnosis

__all__ = ["Diagnosis", "examine"]
