"""Many quantized models of one base model, scored on the same data."""
