"""A cycle-level simulator of an accelerator for FineQ's clusters (arXiv 2504.19746).

A systolic array whose weights come as pulse trains, so that an adder takes the place of
the multiplier, beside plain arrays of multiply-accumulate units of the same size.
"""
