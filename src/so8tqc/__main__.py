"""``python -m so8tqc``: the command line, for launchers that want a module."""

from so8tqc.cli.main import main

if __name__ == "__main__":
    main()
