"""Entry point of ``unimm``: the table of commands, and exit codes.

Nothing heavy (torch, Megatron-Core, pydantic) is imported here or at the top of a command's file, so that help is there
at once. Exit codes: 0 done, 2 wrong usage, config or input, 75 stopped by a signal after saving, 130 interrupted.
"""

import logging
import os
import sys
from collections.abc import Sequence

import click

from megatron_unimm.cli.chat import chat
from megatron_unimm.cli.convert import convert
from megatron_unimm.cli.data import data
from megatron_unimm.cli.doctor import doctor
from megatron_unimm.cli.evaluate import evaluate
from megatron_unimm.cli.generate import generate
from megatron_unimm.cli.health import health
from megatron_unimm.cli.plan import plan
from megatron_unimm.cli.status import status
from megatron_unimm.cli.train import train
from megatron_unimm.errors import UserError

COMMANDS = (train, plan, status, convert, data, generate, chat, evaluate, doctor, health)
USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Begin with: unimm doctor. Then launchers/quickstart.sh trains a small model in the Shapes world.",
)
@click.version_option(package_name="megatron_unimm")
def unimm() -> None:
    """Train unified multimodal models, which understand and generate images, on Megatron-Core."""


for command in COMMANDS:
    unimm.add_command(command)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Errors of the user become one line on stderr."""
    _set_up_logging()
    try:
        # Without standalone mode click returns what the command returns, or the code of ctx.exit().
        code = unimm.main(args=arguments, prog_name="unimm", standalone_mode=False)
    except UserError as error:
        return _report(f"{error.where}: {error.what}")
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "unimm"
        return _report(f"{command}: {error.format_message()} Try '{command} --help'.")
    except click.ClickException as error:
        return _report(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (head, less) has gone. Point stdout elsewhere, or Python complains once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        # A full disk, a folder that may not be written: the reader can do something about it.
        if error.strerror is None:
            raise
        return _report(f"{error.filename or 'file system'}: {error.strerror.lower()}")
    return code if isinstance(code, int) else 0


def entry() -> None:
    """The console script."""
    sys.exit(run())


def _set_up_logging() -> None:
    """Our own messages from the first rank, warnings from all."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    is_first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("megatron_unimm").setLevel(logging.INFO if is_first else logging.WARNING)


def _report(message: str) -> int:
    """Print one line; under a launcher with the rank, since every rank may have something to say."""
    rank = (
        f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ else ""
    )
    print(f"{rank}error: {' '.join(message.split())}", file=sys.stderr)
    return USER_ERROR
