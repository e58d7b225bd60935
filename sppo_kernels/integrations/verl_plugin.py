"""Module that verl imports itself (entry-point group ``verl.plugins``); do not import it directly."""

import warnings

from .verl import patch_when_imported

try:
    patch_when_imported()
except ImportError as error:  # verl would swallow it
    warnings.warn(f"sppo_seq is not available in verl: {error}", stacklevel=1)
