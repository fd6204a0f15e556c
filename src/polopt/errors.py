"""The errors polopt raises on purpose: one line each, naming what is wrong and the remedy."""


class PoloptError(Exception):
    """Base of every error that polopt raises on purpose."""


class ConfigError(PoloptError):
    """A configuration or call that cannot work; names the field, its value and the values allowed."""


class MissingExtraError(ConfigError):
    """An optional library is not installed; names its `pip install "polopt[EXTRA]"`."""


class CheckpointError(PoloptError):
    """A checkpoint that cannot be written, or that is damaged or of another run; names the file."""
