"""Where files come from: a local path, TWINBENCH_DATA, a wheel or the hub; and what is made of them once."""
