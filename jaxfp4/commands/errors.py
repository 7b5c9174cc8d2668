"""Errors that the command line shows as one line."""


class CommandError(Exception):
    """Bad input; the message is the line to show."""
