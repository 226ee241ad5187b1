"""What fields and values of the configuration were called before.

An old spelling is refused and the new one named: it is not taken for a typing error, and nothing
runs with other settings than its file says.
"""

# Old name of a field -> its new one. Items of lists are called N. A section may be part of a larger
# tree: `finetune.window` is also found in `base.finetune.window`.
FIELDS = {
    "finetune.window": "finetune.unit_tokens",
    "memory.cases.N.window": "memory.cases.N.unit_tokens",
    "engine.window": "engine.unit_tokens",
}
# Field -> old value -> its new name.
VALUES = {"finetune.saved": {"inputs": "attention"}}


def new_field(location: tuple[str | int, ...]) -> str | None:
    """The new name of a field that is unknown at this place, if it was known before."""
    for old, new in FIELDS.items():
        if (start := _match(old, location)) is not None:
            places = [key for key in location if isinstance(key, int)]
            names = [str(places.pop(0)) if name == "N" else name for name in new.split(".")]
            return ".".join([*map(str, location[:start]), *names])
    return None


def new_value(location: tuple[str | int, ...], value: object) -> str | None:
    """The new name of a value that this field does not take, if it took it before."""
    for field, names in VALUES.items():
        if isinstance(value, str) and _match(field, location) is not None:
            return names.get(value)
    return None


def _match(name: str, location: tuple[str | int, ...]) -> int | None:
    """Where in `location` the dotted name begins that it ends with; None if it does not."""
    keys = name.split(".")
    start = len(location) - len(keys)
    own = ["N" if isinstance(key, int) else key for key in location[max(start, 0) :]]
    return start if start >= 0 and own == keys else None
