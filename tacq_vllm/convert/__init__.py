"""From other formats to TaCQ checkpoints, and back to ordinary ones."""
