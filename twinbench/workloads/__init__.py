"""One folder is one kind of model: how its experts are opened, fine-tuned, run and scored."""
