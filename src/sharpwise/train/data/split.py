"""Which documents are for validation: whole ones, chosen by their digests, so that the choice knows no order."""

from sharpwise.train.data.documents import Document


def split_documents(documents: list[Document], share: float = 0.05) -> tuple[list[Document], list[Document]]:
    """Training and validation documents, each in an order that depends on their names and texts alone.

    Validation gets whole documents until it has `share` of the characters, and never more than twice that while a
    smaller document is left. A single document is cut at the line nearest to the end of its first `1 - share`.

    Args:
        documents: all there are.
        share: of the characters, for validation, above 0 and below 1.

    >>> train, validation = split_documents([Document(str(i), "text" * 9) for i in range(20)])
    >>> len(train), len(validation)
    (19, 1)
    """
    return split_chunk(documents, share, seen=0, held=0, last=True)


def split_chunk(
    documents: list[Document], share: float, *, seen: int, held: int, last: bool
) -> tuple[list[Document], list[Document]]:
    """Like `split_documents`, for the next chunk of a long sequence: a pure function of the documents so far.

    Args:
        documents: of the chunk.
        share: of all characters so far that validation should have.
        seen: characters of the chunks before.
        held: how many of them validation has.
        last: whether the sequence ends with this chunk.
    """
    total = sum(len(document.text) for document in documents)
    wanted = share * (seen + total) - held
    if len(documents) == 1 and ((last and not seen) or not documents[0].whole):
        return _cut(documents[0], min(wanted / total, 0.5)) if wanted > 0 else (documents, [])
    train: list[Document] = []
    validation: list[Document] = []
    taken = 0
    for document in sorted(documents, key=lambda document: document.digest):
        if taken < wanted and taken + len(document.text) <= 2 * wanted:
            validation.append(document)
            taken += len(document.text)
        else:
            train.append(document)
    if not validation and not held and (last or len(documents) > 1):  # few and large documents
        validation.append(min(train, key=lambda document: len(document.text)))
        train.remove(validation[0])
    return train, validation


def _cut(document: Document, share: float) -> tuple[list[Document], list[Document]]:
    text = document.text
    at = text.rfind("\n", 0, max(1, int(len(text) * (1 - share)))) + 1
    at = at or int(len(text) * (1 - share))
    return [Document(document.name, text[:at])], [Document(document.name + "#end", text[at:])]
