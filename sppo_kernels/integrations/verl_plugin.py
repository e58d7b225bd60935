"""Module that verl imports itself (entry-point group ``verl.plugins``); do not import it directly.

It says nothing where nobody asks for it: a part that does not fit the installed version raises the reason on first use.
"""

from .verl import patch_when_imported

patch_when_imported()
