"""What each part of the model is worth: the same run without it, beside it, more of it. The command is tools/ablate.py."""
