"""Text to tokens, and tokens to batches.

`prepare_tokens` writes a folder of tokens, `write_examples` one of what is no text; `open_tokens` opens either, and
`window_starts` says which windows a step sees.
"""

from sharpwise.train.data.documents import END_OF_TEXT, Document
from sharpwise.train.data.examples import write_examples
from sharpwise.train.data.listing import told
from sharpwise.train.data.preparation import PrepareProgress, prepare_tokens
from sharpwise.train.data.sampler import even_starts, window_starts
from sharpwise.train.data.sources import find_source
from sharpwise.train.data.split import split_documents
from sharpwise.train.data.tokenizer import load_tokenizer, same_tokens
from sharpwise.train.data.tokens import Prepared, Tokens, open_tokens

__all__ = [
    "END_OF_TEXT",
    "Document",
    "PrepareProgress",
    "Prepared",
    "Tokens",
    "even_starts",
    "find_source",
    "load_tokenizer",
    "open_tokens",
    "prepare_tokens",
    "same_tokens",
    "split_documents",
    "told",
    "window_starts",
    "write_examples",
]
