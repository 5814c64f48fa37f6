"""The report: a run folder in, one HTML file and its JSON and CSV out. It measures nothing itself."""

from __future__ import annotations

from qexport.benchmarks.report.build import ReportFiles, build_report
from qexport.benchmarks.report.experiments import ExperimentFiles, build_experiments
from qexport.benchmarks.report.render import strip_timings

__all__ = ["ExperimentFiles", "ReportFiles", "build_experiments", "build_report", "strip_timings"]
