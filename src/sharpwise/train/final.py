"""What a finished run leaves: the model as Hugging Face saves it, its tokenizer, and a text that it wrote."""

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sharpwise.files import replace_folder, write_whole
from sharpwise.installing import needs
from sharpwise.model_facts import logits_of
from sharpwise.train.build import Built
from sharpwise.train.data import END_OF_TEXT
from sharpwise.train.folder import RunFolder

logger = logging.getLogger("sharpwise.train")

PROMPT, LENGTH, TEMPERATURE = 16, 120, 0.8


def save_final(place: RunFolder, built: Built) -> None:
    """Write `final/`, whole or not at all, and `sample.txt`."""
    world = built.plan.world
    weights = world.gathered(built.model)

    def fill(folder: Path) -> None:
        _full_is_os_error(lambda: save_model(built, folder, weights))

    world.on_main(lambda: replace_folder(place.final, fill))
    text = sample_text(built)  # all that hold a part of the model take part
    world.on_main(lambda: write_whole(place.path / "sample.txt", text + "\n"))


def _full_is_os_error(write: Callable[[], None]) -> None:
    """The libraries that write the model report a full disk as an error of their own, with the number in its text."""
    try:
        write()
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError) or found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


def save_model(built: Built, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """The weights and the tokenizer, for `from_pretrained` where the model is one of Hugging Face's.

    `weights` are those of the model, where it has only a part of them.
    """
    model: Any = built.model
    tokenizer = built.data.tokenizer()
    if hasattr(model, "save_pretrained"):
        import transformers

        model.config.use_cache = True
        bars = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()  # it would be drawn over the run's own
        model.save_pretrained(folder, state_dict=weights)
        if bars:
            transformers.utils.logging.enable_progress_bar()
        end = tokenizer.id_to_token(built.data.end_of_text)
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token=end, bos_token=end, unk_token=end
        )
        fast.model_max_length = built.plan.context
        fast.save_pretrained(folder)
        model.config.use_cache = False
    else:
        with needs("saving a model", "train"):
            from safetensors.torch import save_model as save
        whole: Any = model if weights is None else SimpleNamespace(state_dict=lambda: weights)
        save(whole, str(folder / "model.safetensors"))
        tokenizer.save(str(folder / "tokenizer.json"))


def sample_text(built: Built) -> str:
    """The beginning of the validation text and how the model goes on, with a mark in between; the same every time."""
    text = built.data.validation
    start = torch.from_numpy(text.windows(np.zeros(1, dtype=np.int64), min(PROMPT, len(text))))
    tokens = generate(
        built.model, start.to(built.plan.device), LENGTH, context=built.plan.context, seed=built.plan.seed
    )
    built.plan.world.rest(built.model)
    tokenizer = built.data.tokenizer()
    ids = tokens[0].tolist()
    given = start.shape[1]
    said = [tokenizer.decode(part, skip_special_tokens=False) for part in (ids[:given], ids[given:])]
    return " >>> ".join(said).replace(END_OF_TEXT, "\n\n")


@torch.no_grad()
def generate(model: nn.Module, tokens: Tensor, length: int, *, context: int, seed: int) -> Tensor:
    """`tokens`, int64 [1, n], and `length` more, drawn from the model at temperature 0.8.

    Without a cache of keys and values, so that it works for any model that gives logits. It ends early where these are
    not finite, so that there is nothing to draw from.
    """
    chance = torch.Generator(tokens.device).manual_seed(seed)
    training = model.training
    model.eval()
    for _ in range(length):
        seen = tokens[:, -context:]
        logits = logits_of(model(seen), seen)[:, -1].float() / TEMPERATURE
        chances = torch.softmax(logits, -1)
        if not chances.isfinite().all():
            logger.warning("the model gives logits that are not finite; the text that it writes ends there")
            break
        drawn = torch.multinomial(chances, 1, generator=chance)
        tokens = torch.cat([tokens, drawn], 1)
    model.train(training)
    return tokens
