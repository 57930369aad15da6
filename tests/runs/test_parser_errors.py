"""One sentence of what a parser says over many lines; the command line's tests hold what users see of it."""

from lineara.runs.parser_errors import one_sentence


def test_the_innermost_reason_is_kept_with_its_place():
    message = """\
Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [A, B]
  Errors:
    Parser key "dim":
      Expected a <class 'int'>
  Given value: many"""
    assert one_sentence(message) == "model.dim: Expected a <class 'int'>; got many"


def test_one_line_stays_as_it_is():
    assert one_sentence("  an option is not known\n") == "an option is not known"
