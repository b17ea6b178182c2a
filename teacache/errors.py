"""The errors that a user can do something about; everything else keeps its traceback."""


def one_line(message: str) -> str:
    """The message with its line breaks, and whatever else cannot be printed, written out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)


class TeaCacheError(Exception):
    """A wrong input or a missing piece of the environment, said in one line."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


class ArgumentError(TeaCacheError):
    """An argument, or a file that an argument names, cannot be used as it is."""


class CheckpointError(TeaCacheError):
    """The checkpoint cannot be found, fetched or read as a ConsisID checkpoint."""


class DeviceError(TeaCacheError):
    """The machine lacks what the run needs."""


class ImageError(TeaCacheError):
    """The image cannot be read, or no face can be found in it."""


class SamplingError(TeaCacheError):
    """The video cannot be sampled with these settings."""


class OutputError(TeaCacheError):
    """The output folder cannot take the video and its record."""
