"""Faults to order, calls to record, and the child process that stands for a running game.

STANDIN_SMAC_FAULTS: a JSON list such as [{"seed": 1000, "step": 7, "kind": "crash"}].
    kind      crash | hang | die | raise         in step()
              crash_on_reset | dead_reset | no_launch | slow   in reset()
    seed      of the environments it happens to (absent: all)
    step      which step() call of the environment object, from 1 on (absent: every one)
    reset     which reset() call of the environment object, from 1 on (absent: every one)
    once      path of a marker file: happens only while the file does not exist, and makes it
    seconds   how long a hang or a slow reset takes (absent: very long)
    builtin   false: raise and no_launch raise what pysc2 does, an exception that is named
              ConnectionError but is not Python's (absent: a subclass of Python's)
STANDIN_SMAC_LOG: a file to append JSON lines to: {"call", "pid", "seed", "max_reward", ...}, with
    call one of init, launch, reset, step, full_restart, save_replay, close, atexit, and fault.
"""

import json
import os
import shutil
import subprocess
import tempfile

from smac.env.starcraft2 import protocol

KINDS = {
    "step": ("crash", "hang", "die", "raise"),
    "reset": ("crash_on_reset", "dead_reset", "no_launch", "slow"),
}
OPTIONS = {"seed", "once", "seconds", "builtin", "kind"}


def connection_error(fault, message):
    """The exception that a fault asks for."""
    builtin = fault.get("builtin", True)
    kind = protocol.GameConnectionError if builtin else protocol.ConnectionError
    return kind(f"stand-in: {message}")


class Faults:
    """The faults ordered for one environment object."""

    def __init__(self, seed):
        ordered = json.loads(os.environ.get("STANDIN_SMAC_FAULTS") or "[]")
        for fault in ordered:
            counter = next((c for c, kinds in KINDS.items() if fault.get("kind") in kinds), None)
            if counter is None or set(fault) - OPTIONS - {counter}:
                raise ValueError(f"STANDIN_SMAC_FAULTS: cannot understand {fault}")
        self.ordered = [fault for fault in ordered if fault.get("seed", seed) == seed]

    def due(self, counter, count):
        """The fault to happen at this call, or {}. counter: "step" or "reset"; count: from 1 on."""
        for fault in self.ordered:
            matches = fault["kind"] in KINDS[counter] and fault.get(counter, count) == count
            if matches and self._first_time(fault.get("once")):
                return fault
        return {}

    @staticmethod
    def _first_time(marker):
        """Whether this process is the one that made the marker file (True without a marker)."""
        try:
            if marker:
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


def log(call, **entry):
    """Append one JSON line in a single write, so that lines of several processes do not mix."""
    path = os.environ.get("STANDIN_SMAC_LOG")
    if not path:
        return
    line = json.dumps({"call": call, "pid": os.getpid(), **entry}, default=str) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


class Game:
    """A child process that outlives a killed parent, and a temporary folder: both go on close()."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="sc-")
        null = subprocess.DEVNULL  # an orphan must not hold the pipes that a test reads to the end
        self.process = subprocess.Popen(["sleep", "100000"], stdin=null, stdout=null, stderr=null)

    @property
    def running(self):
        return self.process.poll() is None

    def close(self):
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
