"""The table that --verify prints: what was compared, how far it differs, and how far it may."""

from dataclasses import dataclass, field

_FORM = "verify: {what:<48} {difference:>12} {allowed:>9}  {verdict:<9}  {note}"


@dataclass
class ComparisonTable:
    """Prints a row for each comparison as soon as it is made, and keeps what is wrong."""

    problems: list[str] = field(default_factory=list)
    """What differs, in words."""
    _has_head: bool = False

    def add(
        self,
        what: str,
        difference: str,
        allowed: str,
        problem: str | None = None,
        *,
        note: str = "",
    ) -> None:
        """Print one comparison.

        Args:
            problem: what is wrong, None = nothing.
            note: where the largest difference is, and the like.
        """
        if not self._has_head:
            self._print("what is compared", "difference", "allowed", "", "")
            self._has_head = True
        if problem is not None:
            self.problems.append(problem)
        self._print(what, difference, allowed, "ok" if problem is None else "DIFFERENT", note)

    def remark(self, text: str) -> None:
        """Print something that helps to read the table."""
        print(f"verify: {text}", flush=True)

    def raise_problems(self, subject: str, fix: str) -> None:
        """Raise ValueError where anything differs, with all of it."""
        if self.problems:
            raise ValueError(
                f"verification of the {subject} failed: {'; '.join(self.problems)}. Fix: {fix}."
            )

    @staticmethod
    def _print(what: str, difference: str, allowed: str, verdict: str, note: str) -> None:
        row = _FORM.format(
            what=what, difference=difference, allowed=allowed, verdict=verdict, note=note
        )
        print(row.rstrip(), flush=True)
