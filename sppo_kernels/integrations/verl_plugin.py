"""Module that verl imports itself (entry-point group ``verl.plugins``); do not import it directly.

It says nothing where nobody asks for it: a part that does not fit the installed version raises the reason on first use.
"""

from importlib.util import find_spec

from .verl import patch_when_imported

if find_spec("verl") is not None:  # tools that walk through the package import this module too
    patch_when_imported()
