"""Run the `lca` command line: each command has a file that reads options, calls one function and
prints the result.

Commands are imported when they are called, so that `lca --help` and every `dask` call stay fast.
"""

from __future__ import annotations

import importlib
import keyword
import sys
import traceback
from typing import IO, Any

import click

from ..base.text import did_you_mean, safe
from ..errors import InputError, Interrupted, LCAError
from ..replay.display import Stream, open_standard_descriptors, showable, stderr, wrapped

COMMANDS = {
    "basis": "Write the directions in which training moved the weights most.",
    "compare": "Compare runs: layer sums, intervals, p-values.",
    "demo": "Train, record and replay a small real model in under a minute.",
    "export": "Write findings as NetCDF, CSV, Parquet or TensorBoard files.",
    "import": "Convert checkpoints in other formats to safetensors files.",
    "info": "Print what a bug report needs.",
    "inspect": "Check whether checkpoints belong to one training.",
    "plan": "Estimate what a run costs, and probe the task.",
    "plot": "Draw a finding: layers, curve, microscope, … as a picture or a film.",
    "remove": "Drop a loss from a run.",
    "repair": "Recompute damaged spans of a run.",
    "report": "Write the findings of runs into one HTML page that opens offline.",
    "run": "Allocate the loss change of every segment to every parameter.",
    "status": "Show the progress of a run.",
    "summary": "Show headline figures and what each module was allocated.",
    "verify": "Check every stored byte of a run.",
}
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Failure(click.ClickException):
    """An error of this package, which click shows as one line on stderr, with the error's own exit
    code.
    """

    def __init__(self, error: LCAError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]

    def show(self, file: IO[Any] | None = None) -> None:
        text = "lca: " + safe(" ".join(self.message.splitlines()))
        print(wrapped(text, stderr()), file=Stream(sys.stderr, matters=False), flush=True)


def _refusal(error: click.UsageError) -> _Failure:
    """Return a usage error in one line, with the nearest option where one is mistyped."""
    text, called = error.format_message(), error.ctx
    if isinstance(error, click.NoSuchOption) and called is not None:
        options = [
            option
            for parameter in called.command.get_params(called)
            for option in (*parameter.opts, *parameter.secondary_opts)
            if isinstance(parameter, click.Option)
        ]
        name = error.option_name
        text = f"No such option {name!r}.{did_you_mean(name, options)}"
    return _Failure(InputError(f"{text} See {called.command_path if called else 'lca'} --help."))


class _Context(click.Context):
    """A context that replaces characters in its help that the terminal cannot show."""

    def get_help(self) -> str:
        return showable(super().get_help(), getattr(sys.stdout, "encoding", None) or "utf-8")


class _Group(click.Group):
    """A group that lists its commands by name and imports a command when it is called."""

    context_class = _Context

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = importlib.import_module(
            f".{name}{'_' * keyword.iskeyword(name)}", __name__
        ).command
        assert isinstance(command, click.Command)
        command.name = name  # every file calls its own `command`
        command.help = (command.help or "").partition("\f")[0].rstrip()  # `Args:` follow
        command.context_class = _Context
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            ctx.fail(f"No such command {name!r}.{did_you_mean(name, COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        open_standard_descriptors()
        try:
            return super().make_context(*args, **options)
        except click.UsageError as error:
            raise _refusal(error) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (LCAError, KeyboardInterrupt) as error:
            if ctx.params.get("debug"):
                traceback.print_exc(file=sys.stderr)
            known = (
                error
                if isinstance(error, LCAError)
                else Interrupted("stopped. Run the same command again to resume.")
            )
            raise _Failure(known) from None
        except click.UsageError as error:
            raise _refusal(error) from None
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.params.get("debug"):
                traceback.print_exc(file=sys.stderr)
            text = (
                f"unexpected {type(error).__name__}: {error}. Show the traceback with `lca --debug …`, and "
                "please report it with what `lca info` prints."
            )
            raise _Failure(LCAError(text)) from None


@click.group(
    "lca",
    cls=_Group,
    context_settings=SETTINGS,
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(package_name="lca_posthoc", prog_name="lca")
@click.pass_context
def cli(ctx: click.Context, /, **_: bool) -> None:
    """Loss Change Allocation after training: which weights did the learning.

    Training saves every iterate as safetensors; `lca run` replays them, computes full-data
    gradients and allocates the change of any loss to every parameter.

    \b
    lca demo                                 # the first minute
    lca run checkpoints --task my_task.py    # the main job; run again, it resumes
    lca summary checkpoints.lca
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> None:
    """Run the `lca` console script."""
    cli()
