"""`lca import`."""

from __future__ import annotations

from typing import Any

import click

from ..base.text import count
from .completion import complete_path
from .show import bar, prints_to_stderr, say, stdout


@click.command("import")
@click.argument("source", type=click.Path())
@click.argument("directory", type=click.Path(), metavar="DIR")
@click.option(
    "--key",
    metavar="KEY",
    help="The entry of each checkpoint that holds the state dict, where that is ambiguous: a name, "
    "or a path such as app.model.",
)
@click.option(
    "--pattern",
    metavar="REGEX",
    help="A regular expression with (?P<step>\\d+) for names, also where it counts epochs or saves; "
    "names that do not match are skipped.",
)
@click.option(
    "--steps",
    metavar="A:B[:K],S,…",
    help="For a SOURCE with {step} in it: the training steps to import, as for lca run.",
)
@click.option(
    "--dataset",
    metavar="NAME",
    help="For an HDF5 file: the data set with a row for every iterate.  [default: all_weights]",
)
@click.option(
    "--task",
    metavar="FILE[:FUNCTION]",
    shell_complete=complete_path,
    help="For an HDF5 file: the task whose model gives the order and shapes of the parameters.",
)
def command(source: str, directory: str, **options: Any) -> None:
    """Convert the checkpoints of SOURCE to safetensors files in DIR, which `lca run` reads.

    Reads what torch.save, Lightning and older Hugging Face trainers wrote, shards of
    torch.distributed.checkpoint and DeepSpeed, and HDF5 with a row for every iterate. Run again, it
    resumes and adds new checkpoints. SOURCE is a directory, or a path with {step} in place of the
    step.

    \b
    lca import lightning_logs/version_0/checkpoints checkpoints
    lca import saved checkpoints --key app.model
    lca import saved checkpoints --key ema --pattern 'model_(?P<step>\\d+)'
    lca import 'run7/step{step}/pytorch_model.bin' checkpoints --steps 0:100,200
    lca import weights.h5 checkpoints --task my_task.py

    Where every step was saved, it reads the optimiser's states too (optimizer.pt of a trainer,
    optimizer_states of Lightning), for `lca run --causes`.

    It unpickles tensors and plain data alone and skips objects of other classes. safetensors files
    need no import for their weights. HDF5 needs h5py: pip install 'lca_posthoc[convert]'.

    \f

    Args:
        source: a directory, or a path with {step} in it.
        directory: where the safetensors files go.
        options: of `convert`, None where not given.
    """
    from ..convert import convert
    from ..errors import amount

    with prints_to_stderr(), bar("checkpoints") as progress:
        done = convert(source, directory, say=say, progress=progress, **options)
    before = f"; {done.present:,} were there" if done.present else ""
    stdout().print(
        f"wrote {done.written:,} of {count(len(done.steps), 'checkpoint')} (steps {done.steps[0]} "
        f"to {done.steps[-1]}), {amount(done.bytes)}, to {directory}{before}",
        markup=False,
    )
