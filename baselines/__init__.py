"""One file is one published merging method: a function ``merge(base, experts, *, hyperparameters) -> Merged``."""
