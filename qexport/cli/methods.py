"""The option that asks for other methods of quantization, and what they came to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from qexport.cli import screen, tables
from qexport.method_results import FLOAT

if TYPE_CHECKING:
    from qexport.work import Work

Methods: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        metavar="NAME",
        rich_help_panel="Other methods of quantization",
        help="Quantize the detector by this method too and compare: [bold]dynamic[/bold], linears alone, by PyTorch; "
        "[bold]activations[/bold], feature maps alone, weights float; [bold]ptq[/bold], scales calibrated on "
        "images, to stand beside a QAT checkpoint's own (a run with --qat has it by itself). What qexport exports "
        "is static, and always in the table. May be given several times.",
        show_default=False,
    ),
]


def show_methods(work: Work, methods: Sequence[str], *, runs: int) -> None:
    """Measure the methods; show a row for each."""
    from qexport import pipeline  # noqa: PLC0415 - `--help` needs none of it
    from qexport.benchmarks.report.formats import megabytes, signed, speed  # noqa: PLC0415

    report, latency = pipeline.compare_methods(work, methods, runs=runs)
    table = tables.make_table(
        "method", ">size", ">VOC mAP 0.5", ">change", ">COCO mAP", ">change", ">p50 ms", "than float"
    )
    before = report.rows[0]
    whole = latency.whole if latency else {}
    for row in report.rows:
        stats, own = whole.get(row.method), row.method == FLOAT
        table.add_row(
            row.method,
            megabytes(row.size_bytes),
            f"{100 * row.voc_map50:.2f}",
            signed(None if own else 100 * (row.voc_map50 - before.voc_map50), 2),
            f"{100 * row.coco_map:.2f}",
            signed(None if own else 100 * (row.coco_map - before.coco_map), 2),
            f"{stats.p50_ms:.2f}" if stats else "-",
            speed(whole[FLOAT].p50_ms / stats.p50_ms) if stats and not own else "-",
        )
    table.caption = (
        f"{report.dataset}/{report.split}: {report.images} images; points of 100; PyTorch, 1 thread"
    )
    screen.show_table(table)
    screen.show(f"wrote {work.path / 'methods.json'}")
