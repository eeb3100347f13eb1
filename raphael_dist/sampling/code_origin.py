"""States whether this code runs in the installed package, or as the copy that the folder of an exported model contains."""

from typing import Final

IN_PACKAGE: Final = True  # convert/exported_code.py leaves out the branches `if IN_PACKAGE:`
