"""`python -m src.data.sample` is now `python -m src.data.synthetic`."""

import sys

if __name__ == "__main__":
    sys.exit("`python -m src.data.sample` is now `python -m src.data.synthetic`, with the same arguments")
