"""DL-QAT: training a packed checkpoint, so that it wins back what few bits lost."""
