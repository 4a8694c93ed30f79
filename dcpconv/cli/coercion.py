"""Values of the command line that are already what a command wants are passed on as they are.

typer 0.29 turns every value over to pydantic, text that stays text and options that were not given
included.  Importing pydantic for that takes longer than a small conversion.
"""

from __future__ import annotations

from functools import partial
from typing import Any


def spare(command: Any) -> Any:
    """``command``, whose parameters ask typer only about values that must be converted.

    Nothing changes with an older typer, which has no such step.
    """
    for parameter in command.params:
        _spare(parameter)
    usual = command.get_help_option
    command.get_help_option = lambda context: _spare(usual(context))
    for inner in getattr(command, "commands", {}).values():
        spare(inner)
    return command


def _spare(parameter: Any) -> Any:
    if hasattr(parameter, "type_descriptor") and "process_value" not in vars(parameter):
        parameter.process_value = partial(_process, parameter, parameter.process_value)
    return parameter


def _process(parameter: Any, usual: Any, context: Any, value: Any) -> Any:
    if parameter.required and not value:
        return usual(context, value)
    kind = parameter.type_descriptor.annotation
    if parameter.multiple or parameter.nargs == -1:
        if kind != list[str] or isinstance(value, str):
            return usual(context, value)
        value = list(value or ())
    elif value is not None:
        is_default = value == parameter.default  # whose bounds need no check
        if type(value) is not kind or (kind not in {str, bool} and not is_default):
            return usual(context, value)
    return value if parameter.callback is None else parameter.callback(context, parameter, value)
