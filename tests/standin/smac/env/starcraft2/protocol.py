"""The exceptions of a lost connection: Python's kind, and pysc2's kind of the same name."""


class GameConnectionError(ConnectionError):
    """The game is gone, or could not be launched."""


class ConnectionError(Exception):
    """As in pysc2.lib.protocol: not a builtins.ConnectionError, which an `except` may overlook."""
