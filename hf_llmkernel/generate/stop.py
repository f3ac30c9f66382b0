"""Text up to the first of some stop strings, while it is still being written."""

from collections.abc import Sequence


class StopStrings:
    """Lets text through that no stop string can begin in any more; `found` once one of them was there."""

    def __init__(self, strings: Sequence[str]):
        self.strings = list(strings)
        self.found = False
        self._held = ""

    def feed(self, text: str) -> str:
        """What may be shown of all that was fed and was not shown yet."""
        if self.found or not self.strings:
            return "" if self.found else text
        self._held += text
        places = [place for string in self.strings if (place := self._held.find(string)) >= 0]
        if places:
            self.found = True
            return self._held[: min(places)]
        safe = len(self._held) - self._begun()
        shown, self._held = self._held[:safe], self._held[safe:]
        return shown

    def rest(self) -> str:
        """What was held back and turned out to begin no stop string."""
        return "" if self.found else self._held

    def _begun(self) -> int:
        """Characters at the end that begin a stop string."""
        longest = max(map(len, self.strings)) - 1
        lengths = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in lengths if any(s.startswith(self._held[-n:]) for s in self.strings)), 0)


def cut(text: str, strings: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    return text[: min([place for string in strings if (place := text.find(string)) >= 0], default=len(text))]
