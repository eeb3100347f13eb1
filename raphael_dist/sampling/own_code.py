"""States whether this code runs in the installed package, or as the copy of it in the folder of an exported model."""

from typing import Final

IN_PACKAGE: Final = True  # convert/exported_code.py leaves out the branches `if IN_PACKAGE:`
