"""Which answers the operations gave, kept in a file: who asks and who counts are two processes."""

from collections import Counter
from pathlib import Path


class Seen:
    """Notes answers in a file, one a line."""

    def __init__(self, path: Path | str) -> None:
        self._file = Path(path).open("a+")  # noqa: SIM115  # open until the process ends

    def note(self, operation: str, method: str, status: int) -> None:
        """Note one answer."""
        self._file.write(f"{operation} {method} {status}\n")
        self._file.flush()

    @staticmethod
    def counted(path: Path) -> Counter[tuple[str, int]]:
        """Return how often each operation gave each status, for its own method."""
        lines = map(str.split, path.read_text().splitlines())
        return Counter((operation, int(status)) for operation, _, status in lines)
