"""Breaks that no test catches, with the reason why none has to: (file, old, new) → reason."""

ARGUED: dict[tuple[str, str, str], str] = {
    ("_transforms/clip.py", "32", "33"): (
        "Float32 weights too are asked whether they moved; and they did: a float32 factor below 1 "
        "takes at least half a unit in the last place, which rounds to a whole one."
    ),
    ("_diagnostics/measures.py", "1", "2"): (
        "Wide matrices are factored as they are, not transposed: more work for the same singular "
        "values."
    ),
}
