"""What can go wrong with an export, said in one sentence."""


class ExportError(Exception):
    """An export that cannot be made, or that failed its proof; the message is for the user."""


class NoOnnxForm(ExportError):
    """The exporter does not take a module; the message names the operator, and where it is called."""
