"""The command ``lucent``: the extra that it needs, and its entry point.

The commands are in the private package ``_cli``, which imports typer and rich; this module does
without, so that it can say that they are missing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

_NEEDED: Final = frozenset({"typer", "click", "rich"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command ``lucent`` and return its exit code.

    :param arguments: the command line behind the command's name; that of the process if left out.
    """
    try:
        from ._cli.run import run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _NEEDED:
            raise
    except KeyboardInterrupt:  # the import takes long enough for somebody to see a mistake
        sys.stderr.write("lucent: interrupted\n")
        return 130
    else:
        return run(sys.argv[1:] if arguments is None else arguments)
    sys.stderr.write(
        f"lucent: {missing} is not installed; the extra cli has what the command needs: "
        "pip install typer rich\n"
    )
    return 2
