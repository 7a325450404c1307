"""Errors that a user can mend. Only these become one line at a command line; every other one keeps its traceback."""


class MvkeError(ValueError):
    """What came, what was expected, and what to do."""


class DeclarationError(MvkeError):
    """A declaration of a dataset that cannot be used; the message names file, table and key."""


class DataError(MvkeError):
    """Data that do not fit their declaration; the message names file, column, row and value where it can."""


class ConfigError(MvkeError):
    """A setting of a model or a training that cannot be used."""


class RunError(MvkeError):
    """A run directory that cannot be used; the message says why and what to do."""


class TrainingError(MvkeError):
    """Training that cannot go on; the message says where, and what is kept."""


class MissingExtraError(MvkeError):
    """An optional dependency that is not installed; the message says how to install it."""
