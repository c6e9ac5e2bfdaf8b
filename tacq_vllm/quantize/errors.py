"""What can go wrong while a checkpoint is made."""


class QuantizeError(ValueError):
    """Input that cannot be quantized; the message is one line that says what to do."""
