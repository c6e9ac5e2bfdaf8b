"""The checkpoint format: see SPEC.md beside this file."""
