"""``python -m cytossl_monai.cli.bundle run ...``: as ``python -m monai.bundle``, without its account of the arguments.

MONAI prints a line for each setting that was given, and where it read how to log. The run's own log says both.
"""

from __future__ import annotations

import logging
import runpy


def main() -> None:
    """Hand the command line to MONAI."""
    import monai.bundle.scripts  # noqa: F401 - it sets the level of its loggers when it is imported

    for name in ("monai.bundle.scripts", "monai.bundle.workflows"):
        logging.getLogger(name).setLevel(logging.WARNING)
    runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
