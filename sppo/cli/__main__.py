"""``python -m sppo.cli`` is ``sppo``, for launchers that start a module."""

import sys

from sppo.cli.main import main

sys.exit(main())
