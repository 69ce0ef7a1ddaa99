"""Breaks that no test catches, with the reason why none has to: (file, old, new) → reason."""

ARGUED: dict[tuple[str, str, str], str] = {}
