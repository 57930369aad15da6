"""One sentence of what the parser of a command line says over many lines, with the names that were perhaps meant."""

import ast
import inspect
import re
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module

# What the parser says around the reason.
_AROUND = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Given value",
    "Subclass types",
)
_AROUND += ("a class path (str)", "a dict with", "Problem with given class_path", "Parser key")


def one_sentence(message: str, options: Iterable[str] = ()) -> str:
    """One sentence of a parser's message: where, and its innermost reason.

    Args:
        message: the parser's.
        options: all that the command knows, such as `--trainer.max_steps`.
    """
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip()]
    if len(lines) < 2:
        return " ".join(lines) + _near_options(message, options)
    keys = ".".join(re.findall(r'(?:^ *|: )Parser key "([^"]+)":', message, re.MULTILINE))
    reason = "; ".join(line for line in lines if not line.startswith(_AROUND) and not line.endswith(":"))
    if reason.startswith("Not a valid subclass"):
        reason = f"must have class_path and init_args and no other key, got {_given_keys(message)}"
    reason = reason.split("expects a function or a callable class: ")[-1].split(". Got value: Namespace")[0]
    reason = re.sub(r"^Expected a typing\.Literal\[(.*?)\]\. Got value: ", r"must be one of \1, got ", reason)
    given = re.search(r"Given value: ([^{\n]+)$", message)
    if given and "Got value" not in reason and "NestedArg" not in given[1]:
        reason += f"; got {given[1]}"
    classes = re.findall(r"^ *(?:- )?Problem with given class_path '([^']+)'", message, re.MULTILINE)
    return ": ".join([keys, *classes[-1:], reason[:200]]) + _near_arguments(reason, classes[-1:])


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The end of a sentence that names what was perhaps meant, or nothing."""
    near = get_close_matches(given, list(known), n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _near_options(message: str, options: Iterable[str]) -> str:
    unknown = re.search(r"[Uu]nrecognized arguments: (--[^\s=]+)", message)
    return did_you_mean(unknown[1], options) if unknown else ""


def _near_arguments(reason: str, classes: list[str]) -> str:
    unknown = re.search(r"Option '(\w+)' is not accepted", reason)
    if not unknown or not classes:
        return ""
    module, _, name = classes[0].rpartition(".")
    return did_you_mean(unknown[1], inspect.signature(getattr(import_module(module), name)).parameters)


def _given_keys(message: str) -> str:
    given = re.search(r"Got value: ({.*})", message) or re.search(r"Given value: ({.*})", message)
    try:
        return ", ".join(ast.literal_eval(given[1])) if given else "something else"
    except (ValueError, SyntaxError):
        return "something else"
