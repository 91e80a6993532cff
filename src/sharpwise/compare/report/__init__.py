"""The page of a comparison, with its numbers beside it as JSON and CSV."""
