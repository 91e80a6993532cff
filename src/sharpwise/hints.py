"""What somebody may have meant, and how it is read and told."""

import difflib
from collections.abc import Iterable
from typing import Any

IN_A_TRAINER = "sharpwise.integrations.hf.set_optimizer(trainer, name), before trainer.train()"


ELSEWHERE = {
    "learning_rate": "lr",
    "epsilon": "eps",
    "wd": "weight_decay",
    "beta1": "betas",
    "max_norm": "max_grad_norm",
}
"""Options as other libraries call them."""


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A hint for the message about a name that is not known, empty where nothing is near.

    >>> nearest("adamv", ["lion", "adamw"]), nearest("learning_rate", ["lr", "eps"])
    (" (did you mean 'adamw'?)", " (did you mean 'lr'?)")
    """
    if ELSEWHERE.get(word) in (known := [*known]):
        return f" (did you mean {ELSEWHERE[word]!r}?)"
    found = difflib.get_close_matches(word, sorted(known), n=1, cutoff=cutoff)
    return f" (did you mean {found[0]!r}?)" if found else ""


def word(text: str) -> str | bool:
    """A bare word of a spelling: true and false as TOML has them, or itself.

    >>> word("true"), word("sqrt")
    (True, 'sqrt')
    """
    return {"true": True, "false": False}.get(text, text)


def kind_of(value: Any) -> str:
    """What something of a wrong type is, short however large it is: a model is not printed.

    >>> kind_of(1.5), kind_of(dict), kind_of({}.keys), kind_of(nearest)
    ('float', 'the class dict', 'the method keys, not called', 'the function nearest')
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if hasattr(value, "__self__") and hasattr(value, "__name__"):
        return f"the method {value.__name__}, not called"
    return f"the function {value.__name__}" if type(value).__name__ == "function" else type(value).__name__


def without_model(who: str) -> str:
    """The message where an optimizer was called without a model, as a Trainer calls what it takes for a factory."""
    return f"{who}: no model was given; call {who}(model, lr=...). In a Trainer: {IN_A_TRAINER}"
