"""The methods that the paper compares MAIPG with. MAPPO is the scripts' own nu = 0."""

import importlib
from unittest import mock


def run_variant(script, name, argv, **parts):
    """main(argv) of a script, called `name`, with `parts` in the place of its own; the exit code.

    Command line, environments, run folder, log, checkpoint and evaluation are the script's; what
    differs, a baseline gives by name (Args, Agent, update, train, ...). Put back at the end.
    """
    with mock.patch.multiple(importlib.import_module(script), SCRIPT=name, **parts):
        return importlib.import_module(script).main(argv)
