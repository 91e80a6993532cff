"""`sharpwise measure`: probes on what training left, as files and a page."""
