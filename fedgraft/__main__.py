"""``python -m fedgraft`` is the command ``fedgraft``."""

from fedgraft.cli import main

if __name__ == "__main__":
    main()
