"""A merging method with its hyperparameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from twinbench.merging.factored import Factors, static
from twinbench.merging.merged import Merged
from twinbench.system.mistakes import Mistake


@dataclass(frozen=True)
class Method:
    """A merging method with its hyperparameters.

    Attributes:
        key: equal for methods that give the same weights from the same experts; all that is compared and hashed.
        name: for a person.
        merge: called with the base and the experts, and with ``shared`` if there is a shared method.
        role: "upper bound", "lower bound", "one expert" or None.
        route: ``ROUTE`` of its file; None: it has no exclusive parts.
        shared: the static method that makes the shared expert, if the method asks for one.
        factored: called in place of ``merge`` with LoRA experts that stay factors; None: the file has no such form.
    """

    key: str
    name: str = field(compare=False)
    merge: Callable[..., Merged] = field(compare=False)
    role: str | None = field(default=None, compare=False)
    route: str | None = field(default=None, compare=False)
    shared: "Method | None" = field(default=None, compare=False)
    factored: Callable[..., Merged] | None = field(default=None, compare=False)


def factored(method: Method, base: Mapping[str, Tensor], adapters: Mapping[str, Factors]) -> Merged:
    """The merge of LoRA experts as factors beside the base, which stays as it is.

    A method with exclusive parts says its factored form itself (``factored`` in its file). A static one has one if it
    is linear in the experts.

    Raises:
        ValueError: the method has no factored form.
    """
    if method.factored:
        given = {"shared": factored(method.shared, base, adapters)} if method.shared else {}
        return method.factored(base, adapters, **given)
    if method.route:
        raise Mistake(f"{method.name} has no factored form, which suite.factored=true needs: use suite.factored=false")
    try:
        return static(method.merge, base, adapters)
    except Mistake as error:
        raise Mistake(f"{method.name}: {error}") from None
