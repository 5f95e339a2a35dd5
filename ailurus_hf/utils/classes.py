"""Names of classes, as configurations and files give them."""

from collections import Counter
from collections.abc import Mapping

__all__ = ["class_names"]


def class_names(id2label: Mapping[int, str] | Mapping[str, str] | None, num_labels: int) -> list[str]:
    """The name of every class, each of them once, so that scores can be kept by name.

    Args:
        id2label: names by number, or by number as JSON has it, a string. Classes without one are called `LABEL_i`, as
            in transformers, and classes of one name get their number behind it. None for the numbers alone.
        num_labels: number of classes.
    """
    if not id2label:
        return [str(index) for index in range(num_labels)]
    given = {int(index): name for index, name in id2label.items()}
    names = [str(given.get(index, f"LABEL_{index}")) for index in range(num_labels)]
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({index})" for index, name in enumerate(names)]
