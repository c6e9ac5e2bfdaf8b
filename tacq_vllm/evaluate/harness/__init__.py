"""Tasks of lm-evaluation-harness on this project's items; needs the extra `eval`."""
