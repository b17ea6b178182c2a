"""Errors that a user can fix. All other errors keep their traceback."""

import re

# Parts of a URL that may be secret: user info (also with unescaped / ? # in the password), query
# and fragment. HARMLESS matches values of a query that are not secret.
USER = re.compile(r"(?<=://)([^/?#\s]*@|[^/?#@\s]*:.*@)")
QUERY = re.compile(r"(://[^\s?#]*\?)([^\s#]*)")
FRAGMENT = re.compile(r"(://[^\s#]*#)\S+")
HARMLESS = re.compile(r"(true|false|\d{0,4})")


def one_line(message: str) -> str:
    """The message in one line: line breaks and other unprintable characters are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)


def reason(error: BaseException) -> str:
    """The first line of a library's exception: the system's message, its own, or its type."""
    message = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(message).splitlines()[0]


def without_credentials(text: str) -> str:
    """The text with the credentials in its URLs masked, for messages and records.

    Any value of a query may be the key of a signed URL, because each service has other names for
    it. So only very short values stay. A fragment is masked as a whole.
    """
    text = USER.sub("***@", text)
    text = QUERY.sub(lambda query: query[1] + "&".join(map(_mask, query[2].split("&"))), text)
    return FRAGMENT.sub(r"\1***", text)


def _mask(field: str) -> str:
    """A field of a query, `name=value` or a value without a name, with its value masked."""
    name, equals, value = field.partition("=")
    if not equals:
        return "***"
    return field if HARMLESS.fullmatch(value) else f"{name}=***"


class TeaCacheError(Exception):
    """A wrong input, or something that the machine lacks, as a message of one line."""

    def __init__(self, message: str):
        super().__init__(one_line(without_credentials(message)))


class ArgumentError(TeaCacheError):
    """An argument, or a file that an argument names, is wrong."""


class CheckpointError(TeaCacheError):
    """The checkpoint cannot be found, downloaded or read as a ConsisID checkpoint."""


class DeviceError(TeaCacheError):
    """The machine lacks what the run needs."""


class ImageError(TeaCacheError):
    """The image cannot be read, or no face is detected in it."""


class SamplingError(TeaCacheError):
    """The video cannot be sampled with these settings."""


class OutputError(TeaCacheError):
    """The video and its record cannot be written to the output folder."""
