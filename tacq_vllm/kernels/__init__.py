"""Linear layers on packed weights; `reference` is the truth for every other kernel."""
