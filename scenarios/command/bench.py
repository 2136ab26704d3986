"""`fedtap bench run` and `fedtap bench compare A B`: what fedtap's machinery costs, and whether that has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

bench_cli = typer.Typer(no_args_is_help=True, help="What fedtap's own machinery costs, in ratios of one run.")


@bench_cli.command("run")
def bench_run_command(
    out: Annotated[Path, typer.Option(help="Figures, as JSON; the plot goes beside it.")] = Path("bench.json"),
) -> None:
    """Time everything in turns, on the CPU and on a GPU where there is one: about three minutes."""
    from fedtap.scenarios.bench.suite import run_benches

    run_benches(out)


@bench_cli.command("compare")
def bench_compare_command(
    before: Annotated[Path, typer.Argument(help="A bench's .json.")],
    after: Annotated[Path, typer.Argument(help="A later one's, of the same machine.")],
) -> None:
    """Tell what has changed from noise. Exit code 1: something has become worse."""
    from fedtap.scenarios.bench.ratios import bench_changes

    lines, worse = bench_changes(before, after)
    for line in lines:
        typer.echo(line)
    if worse:
        raise typer.Exit(1)
