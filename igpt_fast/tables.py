"""Tables as CSV files, a line an image."""

import csv
import io
from collections.abc import Iterable, Sequence


def csv_bytes(head: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """The bytes of a CSV file in UTF-8. Names of files that are no text keep their bytes."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    try:
        return text.getvalue().encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a character, which a class of an array can be called
        return text.getvalue().encode("utf-8", "backslashreplace")
