"""The command line: `tfm-guard`.

Importing it costs click and nothing else; what a command needs is imported when it runs.
"""

import click

from tfm_guard import __version__
from tfm_guard.cli.accounts import accounts
from tfm_guard.cli.database import db
from tfm_guard.cli.demo import demo
from tfm_guard.cli.doctor import doctor
from tfm_guard.cli.failures import Program
from tfm_guard.cli.keys import keys
from tfm_guard.cli.prove import prove
from tfm_guard.cli.serve import serve
from tfm_guard.cli.tune import tune

__all__ = ["main"]


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="""Manage API keys in the database that TFM_GUARD_DATABASE_URL names.

\b
It is read from the environment alone, as it may hold a password:
  sqlite:///FILE
  postgresql://USER:PASSWORD@HOST/NAME
""",
    epilog="""\b
Exit codes:
  0  done
  1  refused or failed, in whole or in part; stderr says why
  2  the command line could not be read, or has a token in it
  3  cannot be done, or be shown, now; try again
  4  prove: a deleted key was accepted, or a valid one refused
130  ended by Ctrl-C before it was done
""",
)
@click.version_option(__version__, package_name="tfm-guard")
def main() -> None:
    """Manage API keys: the words for `--help` stand above."""


for command in (accounts, db, demo, doctor, keys, prove, serve, tune):
    main.add_command(command)
