"""The errors of an export; each message is one sentence."""


class ExportError(Exception):
    """An export that is not possible, or that failed its proof; the message is for the user."""


class NoOnnxForm(ExportError):
    """The exporter does not accept a module; the message names the operator and where it is called."""
