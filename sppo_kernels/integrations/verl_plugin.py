"""What verl imports of its own accord (entry-point group ``verl.plugins``); not for importing by hand."""

import warnings

from .verl import patch_when_imported

try:
    patch_when_imported()
except ImportError as error:  # verl would swallow it
    warnings.warn(f"sppo_seq is not there: {error}", stacklevel=1)
