"""What the user did wrong, as one sentence; and what the program could not do."""


class ConfigError(ValueError):
    """A setting is wrong: what, got, allowed, do. Raised before any training; exit code 2."""


class RunError(RuntimeError):
    """A run cannot go on (a lost rank, a full disk): one sentence; exit code 1."""
