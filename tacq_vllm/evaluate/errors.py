"""What can go wrong while a model is evaluated."""


class EvaluateError(ValueError):
    """What cannot be measured; the message is one line that says what to do."""
