"""What a run and a demo leave behind, as pages to read and lines of a table."""
