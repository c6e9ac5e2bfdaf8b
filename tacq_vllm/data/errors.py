"""What can go wrong while data is read."""


class DataError(ValueError):
    """Data that cannot be used; the message is one line: where, why, what to do."""
