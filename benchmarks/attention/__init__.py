"""The attention suite: this library against others, checked and measured."""
