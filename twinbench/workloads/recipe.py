"""What recipes of fine-tuning have in common for all kinds of models."""

from twinbench.system.mistakes import Mistake


def checked(recipe: object, **rules: tuple[bool, str]) -> None:
    """Raise ValueError for the first setting of a recipe that is out of range.

    Args:
        rules: per setting whether it is legal, and what is; beside those that every recipe has.
    """
    every = {
        "epochs": (recipe.epochs >= 1, "at least 1"),
        "batch_size": (recipe.batch_size >= 1, "at least 1"),
        "lr": (recipe.lr > 0, "above 0"),
        "weight_decay": (recipe.weight_decay >= 0, "at least 0"),
        "warmup": (0 <= recipe.warmup < 1, "in [0, 1)"),
    }
    for name, (legal, wanted) in (every | rules).items():
        if not legal:
            raise Mistake(f"suite.finetune.{name} must be {wanted}, got {getattr(recipe, name)}")
