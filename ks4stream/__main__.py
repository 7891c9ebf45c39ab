"""``python -m ks4stream``: the command line, also where its script is not on the path."""

from ks4stream.cli import main

if __name__ == "__main__":
    main(prog_name="python -m ks4stream")
