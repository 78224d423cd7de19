"""What can go wrong with an export, said in one sentence."""


class ExportError(Exception):
    """An export that cannot be made, or that failed its proof; the message is for the user."""
