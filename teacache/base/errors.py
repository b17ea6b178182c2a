"""The errors that a user can do something about; everything else keeps its traceback."""

import re

# The parts of a URL that may be secret: user info (also with unescaped / ? # in the password), the
# query and the fragment; and the values of a query that are no credentials.
USER = re.compile(r"(?<=://)([^/?#\s]*@|[^/?#@\s]*:.*@)")
QUERY = re.compile(r"(://[^\s?#]*\?)([^\s#]*)")
FRAGMENT = re.compile(r"(://[^\s#]*#)\S+")
HARMLESS = re.compile(r"(true|false|\d{0,4})")


def one_line(message: str) -> str:
    """The message with its line breaks, and whatever else cannot be printed, written out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)


def reason(error: BaseException) -> str:
    """What a foreign exception says, in one line: the system's words, its own, or its kind."""
    message = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(message).splitlines()[0]


def without_credentials(text: str) -> str:
    """A text with URLs in it as it may be shown and recorded: without what lets a reader in.

    That may be a password, or of a signed URL any value of the query, whose names differ from one
    service to the next; only the shortest stay. A fragment may hold anything.
    """

    text = USER.sub("***@", text)
    text = QUERY.sub(lambda query: query[1] + "&".join(map(_masked, query[2].split("&"))), text)
    return FRAGMENT.sub(r"\1***", text)


def _masked(field: str) -> str:
    """A field of a query: name=value, or a value alone."""
    name, equals, value = field.partition("=")
    if not equals:
        return "***"
    return field if HARMLESS.fullmatch(value) else f"{name}=***"


class TeaCacheError(Exception):
    """A wrong input or a missing piece of the environment, said in one line."""

    def __init__(self, message: str):
        super().__init__(one_line(without_credentials(message)))


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
