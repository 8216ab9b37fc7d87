"""``python -m sqlalchemy_lucent`` is the command ``lucent``."""

import sys

from .cli import main

if __name__ == "__main__":  # a worker process imports this module too
    sys.exit(main())
