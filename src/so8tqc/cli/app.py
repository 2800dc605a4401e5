"""The command table."""

from __future__ import annotations

import typer

from so8tqc.cli.attest import attest
from so8tqc.cli.bake import bake
from so8tqc.cli.calibrate import calibrate
from so8tqc.cli.capture import capture
from so8tqc.cli.choose import choose
from so8tqc.cli.config import config
from so8tqc.cli.data import data
from so8tqc.cli.demo import demo
from so8tqc.cli.doctor import doctor
from so8tqc.cli.explain import explain
from so8tqc.cli.export import export
from so8tqc.cli.identify import identify
from so8tqc.cli.longtext import longtext
from so8tqc.cli.qc import qc
from so8tqc.cli.quantize import quantize
from so8tqc.cli.report import report
from so8tqc.cli.run import run
from so8tqc.cli.vendor import vendor
from so8tqc.cli.verify import verify

app = typer.Typer(
    name="so8tqc",
    help="Bake SO(8) rotation gates into transformer weights, export, quantize, calibrate, "
    "and prove every step.",
    epilog="Exit codes: 0 passed · 1 a verdict failed · 2 usage or config · 3 bad input · "
    "4 a tool is missing or failed · 70 a defect · 130 interrupted · 143 terminated. Every "
    "command takes --debug, which shows tracebacks, and --no-color, as the variable NO_COLOR.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"so8tqc {installed('so8tqc')}")
        raise typer.Exit


for command in (
    run, demo, identify, bake, export, quantize, calibrate, capture, qc, choose, longtext, report,
    attest, verify, explain, doctor, vendor, data,
):  # fmt: skip
    app.command()(command)
app.add_typer(config)
