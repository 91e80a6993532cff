"""`python -m sharpwise` is `sharpwise`."""

from sharpwise.cli.main import main

if __name__ == "__main__":
    main()
