"""The command table."""

from __future__ import annotations

import typer

from so8tqc.cli.commands.attest import attest
from so8tqc.cli.commands.audit import audit
from so8tqc.cli.commands.bake import bake
from so8tqc.cli.commands.calibrate import calibrate
from so8tqc.cli.commands.capture import capture
from so8tqc.cli.commands.check import check
from so8tqc.cli.commands.choose import choose
from so8tqc.cli.commands.config import config
from so8tqc.cli.commands.data import data
from so8tqc.cli.commands.demo import demo
from so8tqc.cli.commands.doctor import doctor
from so8tqc.cli.commands.explain import explain
from so8tqc.cli.commands.export import export
from so8tqc.cli.commands.identify import identify
from so8tqc.cli.commands.locate import locate
from so8tqc.cli.commands.longtext import longtext
from so8tqc.cli.commands.qc import qc
from so8tqc.cli.commands.quantize import quantize
from so8tqc.cli.commands.report import report
from so8tqc.cli.commands.run import run
from so8tqc.cli.commands.serve_config import serve_config
from so8tqc.cli.commands.vendor import vendor
from so8tqc.cli.commands.verify import verify

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
    run, demo, check, identify, bake, export, quantize, calibrate, capture, qc, locate, choose,
    longtext, report, audit, attest, verify, serve_config, explain, doctor, vendor, data,
):  # fmt: skip
    app.command()(command)
app.add_typer(config)
