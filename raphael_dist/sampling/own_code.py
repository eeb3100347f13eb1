"""Whether code runs inside the package, or in the folder of an exported model, which contains its own code."""

from typing import Final

IN_PACKAGE: Final = True  # convert/exported_code.py leaves out what follows `if IN_PACKAGE:`
