"""One sentence of what the parser of a command line says over many lines."""

import ast
import re

# What the parser says around a complaint.
_AROUND = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Given value",
    "Subclass types",
)
_AROUND += ("a class path (str)", "a dict with", "Problem with given class_path", "Parser key")


def one_sentence(message: str) -> str:
    """One sentence of what the parser says over many lines: where, and its innermost complaint."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip()]
    if len(lines) < 2:
        return " ".join(lines)
    keys = ".".join(re.findall(r'(?:^ *|: )Parser key "([^"]+)":', message, re.MULTILINE))
    complaint = "; ".join(line for line in lines if not line.startswith(_AROUND) and not line.endswith(":"))
    if complaint.startswith("Not a valid subclass"):
        complaint = f"must have class_path and init_args and no other key, got {_given_keys(message)}"
    complaint = complaint.split("expects a function or a callable class: ")[-1].split(". Got value: Namespace")[0]
    complaint = re.sub(r"^Expected a typing\.Literal\[(.*?)\]\. Got value: ", r"must be one of \1, got ", complaint)
    given = re.search(r"Given value: ([^{\n]+)$", message)
    if given and "Got value" not in complaint:
        complaint += f"; got {given[1]}"
    classes = re.findall(r"^ *(?:- )?Problem with given class_path '([^']+)'", message, re.MULTILINE)
    return ": ".join([keys, *classes[-1:], complaint[:200]])


def _given_keys(message: str) -> str:
    given = re.search(r"Got value: ({.*})", message) or re.search(r"Given value: ({.*})", message)
    try:
        return ", ".join(ast.literal_eval(given[1])) if given else "something else"
    except (ValueError, SyntaxError):
        return "something else"
