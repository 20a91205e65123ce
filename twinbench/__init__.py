"""twinbench: an honest, fast benchmark of model merging and Twin-Merging."""
