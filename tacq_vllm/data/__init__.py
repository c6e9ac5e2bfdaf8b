"""Text for calibration and evaluation: plain files and the named sets."""
