"""The loop: finds products, asks, gives answers out, retries, and puts into quarantine.

The process may be killed before and after every `step`: what the journal says is true of the files,
and whatever comes after is done again. Answers are made once. What is outside, the line on
standard output and the hook, happens at least once: a kill in the moment between it and the journal
repeats it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lrs_edge.errors import (
    BackendError,
    BundleError,
    CancelledError,
    ImageError,
    JournalError,
    LrsEdgeError,
    OutOfMemoryError,
    ProductTimeoutError,
    QuestionError,
)
from lrs_edge.watching.asking import Asker, Asking
from lrs_edge.watching.delivery import Delivery, described, no_step
from lrs_edge.watching.hook import Hook
from lrs_edge.watching.journal import Journal, ProductRow
from lrs_edge.watching.names import shown
from lrs_edge.watching.products import (
    Patterns,
    Product,
    Settling,
    content_digest,
    is_unchanged,
    scan,
)
from lrs_edge.watching.questions import Question
from lrs_edge.watching.results import Results, move_away
from lrs_edge.watching.waking import Waking

#: A product during which the process was killed so often in a row, without an answer, is given up.
MAX_UNFINISHED = 50

#: With `once`, products that keep changing are left after so many times the settling time.
_ONCE_PATIENCE = 5

_LONGEST_RETRY = 3600.0


class Stopped(BaseException):
    """The user or the system asks for the end; raised by a signal's handler."""


class _ChangedError(Exception):
    """The product is not what it was when work on it began."""


@dataclass(frozen=True)
class Settings:
    """What is watched, and how.

    Attributes:
        root: The watched folder.
        leave_out: Folders in it that hold no products.
        patterns: What is a product.
        questions: What each is asked.
        settle: Seconds for which a product must stay as it is before it counts as whole.
        interval: Seconds between looks at the folder.
        retries: Further attempts after a first one that failed.
        retry_delay: Seconds before the first of them; each later one waits twice as long.
        time_limit: Seconds that all questions about one product may take in one attempt.
        hook: Run for every result.
        move_to: Where products in quarantine go; None leaves them where they are.
        once: End when nothing is left to do.
    """

    root: Path
    questions: tuple[Question, ...]
    leave_out: tuple[Path, ...] = ()
    patterns: Patterns = field(default_factory=Patterns)
    settle: float = 2.0
    interval: float = 5.0
    retries: int = 2
    retry_delay: float = 10.0
    time_limit: float = 600.0
    hook: Hook | None = None
    move_to: Path | None = None
    once: bool = False


class Worker:
    """Works through products.

    Args:
        settings: What to do.
        journal: What was done.
        results: Writes files.
        asker: Answers.
        waking: Time.
        write: Writes a line of standard output.
        tell: Tells people how it goes.
        step: Told the name of every step before and after which the process may end.

    Attributes:
        answered: Answers that this run made.
        quarantined: Products that it put into quarantine.
    """

    def __init__(
        self,
        settings: Settings,
        journal: Journal,
        results: Results,
        asker: Asker,
        waking: Waking,
        write: Callable[[str], None],
        tell: Callable[[str], None],
        step: Callable[[str], None] = no_step,
    ) -> None:
        self._settings, self._journal, self._results = settings, journal, results
        self._asker, self._waking, self._tell, self._step = asker, waking, tell, step
        self._delivery = Delivery(settings.root, journal, results, settings.hook, write, tell, step)
        self._settling = Settling(settings.settle)
        self._finished: dict[str, str] = {}
        self._waits: dict[str, str] = {}
        self._retry_at: float | None = None
        self._stopping = False
        self.answered = self.quarantined = 0

    def stop(self) -> None:
        """End after what is under way; from any thread or a signal's handler."""
        self._stopping = True
        self._waking.wake()

    def run(self) -> None:
        """Work until everything is done (`once`), or until `stop`.

        Raises:
            BackendError: The engine fails; nothing is lost, and the next run goes on.
            BundleError: A graph is not what the manifest says.
            QuestionError: A question is too long for the model.
            JournalError: With `once`: the disk is full still after all retries.
        """
        started = self._waking.monotonic()
        troubles = 0
        while not self._stopping:
            try:
                self._delivery.deliver_all()
                worked, looked = self._round()
                troubles = 0
            except JournalError as error:
                # A full disk is no fault of the product's: nothing counts, all is tried again.
                troubles += 1
                if self._settings.once and troubles > self._settings.retries:
                    raise
                self._tell(f"{error}; trying again in {self._settings.retry_delay:g} s")
                self._waking.wait(self._settings.retry_delay)
                continue
            if worked:
                continue
            patience = started + _ONCE_PATIENCE * self._settings.settle
            # As of the look: what has become whole since then was not among what was due.
            may_settle = self._settling.is_waiting(looked) and looked < patience
            if self._settings.once and self._retry_at is None and not may_settle:
                return
            self._waking.wait(self._pause(looked))

    def _pause(self, looked: float) -> float:
        """Seconds until there may be something to do, after a look at that time."""
        pause = min(self._settings.interval, self._settling.next_look(looked))
        if self._retry_at is not None:
            pause = min(pause, self._retry_at - self._waking.now())
        return max(pause, 0.01)

    def _round(self) -> tuple[bool, float]:
        """Look once and work through what is due; whether anything was, and when it looked."""
        settings = self._settings
        found = scan(settings.root, settings.patterns, settings.leave_out)
        looked = self._waking.monotonic()
        whole = self._settling.update(found, looked)
        self._tell_waits(found)
        there = {product.path: product for product in found}
        for path in self._finished.keys() - there.keys():
            del self._finished[path]
        due = self._due(whole)
        self._quarantine_failed(there)
        for product in due:
            if self._stopping:
                break
            self._work(product)
            self._quarantine_failed(there)
        return bool(due), looked

    def _tell_waits(self, found: Sequence[Product]) -> None:
        waits = {product.path: ", ".join(product.missing) for product in found if product.missing}
        for path, what in waits.items():
            if self._waits.get(path) != what:
                self._tell(f"{path}: waits for {what}")
        self._waits = waits

    def _due(self, whole: Sequence[Product]) -> list[Product]:
        """Products with questions to ask now; those that the process was killed at come last."""
        now = self._waking.now()
        self._retry_at = None
        due: list[tuple[int, Product]] = []
        for product in whole:
            signature = product.signature
            if self._finished.get(product.path) == signature:
                continue
            row = self._journal.product(product.path)
            if row is None or row.signature != signature:
                due.append((0, product))
            elif self._is_over(row):
                self._finished[product.path] = signature
            elif now < row.not_before <= now + _LONGEST_RETRY:
                self._retry_at = min(self._retry_at or row.not_before, row.not_before)
            elif row.unfinished > MAX_UNFINISHED:
                reason = f"the process ended {row.unfinished} times while working on it"
                self._journal.fail(row.path, reason, LrsEdgeError.exit_code, None, now)
            else:
                due.append((row.unfinished, product))
        due.sort(key=lambda pair: pair[0])
        return [product for _, product in due]

    def _is_over(self, row: ProductRow) -> bool:
        """Whether nothing is left to do for a product that is as the journal knows it."""
        if row.state == "done":
            answered = self._journal.answered(row.path, row.digest)
            return all(question.key in answered for question in self._settings.questions)
        return row.state != "pending"

    def _work(self, product: Product) -> None:
        """One attempt at a product."""
        self._step("found")
        self._journal.begin(product.path, product.signature, self._waking.now())
        self._step("begun")
        try:
            self._ask(product)
        except Stopped:
            self._journal.interrupt(product.path)
            raise
        except Exception as error:
            self._attempt_failed(product, error)
        else:
            self._journal.finish(product.path, self._waking.now())
            self._finished[product.path] = product.signature
        self._step("ended")

    def _attempt_failed(self, product: Product, error: Exception) -> None:
        """Decide whose fault an error is.

        Raises:
            Exception: It is not the product's: whoever started the command has to see to it.
        """
        match error:
            case OutOfMemoryError():
                self._failed(product, error)
            case BackendError() | BundleError() | QuestionError() | CancelledError():
                self._journal.interrupt(product.path)
                raise error
            case JournalError() | BrokenPipeError():
                raise error
            case _ChangedError():
                self._changed(product)
            case _:
                self._failed(product, error)

    def _changed(self, product: Product) -> None:
        self._journal.interrupt(product.path)
        self._tell(f"{product.path}: changed, or left, while it was worked on; looking again")

    def _ask(self, product: Product) -> None:
        """Ask what has no answer yet, and give every answer out."""
        settings = self._settings
        deadline = self._waking.monotonic() + settings.time_limit

        def check() -> None:
            if self._stopping:
                raise Stopped
            if self._waking.monotonic() >= deadline:
                raise ProductTimeoutError(
                    f"{product.path} took longer than {settings.time_limit:g} s (--time-limit)"
                )

        digest = self._digest(product, check)
        answered = self._journal.answered(product.path, digest)
        waiting = [question for question in settings.questions if question.key not in answered]
        if not waiting:
            return
        if product.image is None:
            raise ImageError(f"{product.path} holds no image that --image names")
        self._tell(f"{product.path}: asking {len(waiting)} of {len(settings.questions)}")
        image = settings.root / product.image

        def left() -> float:
            check()
            # Whatever passed since the check: no time at all is not a limit that can be asked for.
            return max(deadline - self._waking.monotonic(), 0.01)

        try:
            with self._asker.open(image, left()) as asking:
                for question in waiting:
                    self._answer(product, digest, question, asking, left())
        except ImageError as error:
            check()  # A read that was given up because the time was over says so.
            raise error

    def _digest(self, product: Product, check: Callable[[], None]) -> str:
        """Of the product's content, read unless the journal knows it."""
        row = self._journal.product(product.path)
        if row is not None and row.digest:
            return row.digest
        try:
            digest = content_digest(self._settings.root, product, check)
        except FileNotFoundError as error:
            raise _ChangedError from error
        if not is_unchanged(self._settings.root, product):
            raise _ChangedError
        self._journal.identify(product.path, digest)
        self._step("identified")
        return digest

    def _answer(
        self, product: Product, digest: str, question: Question, asking: Asking, seconds: float
    ) -> None:
        reply = asking.ask(question.text, seconds)
        self._step("replied")
        if not is_unchanged(self._settings.root, product):
            raise _ChangedError
        row = self._results.row(product, digest, question, reply)
        row = self._journal.answer(row, self._waking.now())
        self._step("answered")
        self.answered += 1
        self._delivery.deliver(row)

    def _failed(self, product: Product, error: Exception) -> None:
        """Note a failed attempt, and when the next one is due."""
        settings, now = self._settings, self._waking.now()
        if not is_unchanged(settings.root, product):
            self._changed(product)
            return
        row = self._journal.product(product.path)
        attempts = 0 if row is None else row.attempts
        is_last = attempts >= settings.retries
        delay = min(settings.retry_delay * 2.0**attempts, _LONGEST_RETRY)
        reason, code = described(error)
        self._journal.fail(product.path, reason, code, None if is_last else now + delay, now)
        self._step("failed")
        if not is_last:
            self._tell(f"{product.path}: {reason}; trying again in {delay:g} s")

    def _quarantine_failed(self, there: dict[str, Product]) -> None:
        """Write the record of every product that is given up, and move it where that is asked."""
        for row in self._journal.products("failed"):
            record = self._results.record(row, self._waking.now())
            self._step("recorded")
            product = there.get(row.path)
            if self._settings.move_to is not None and product is not None:
                try:
                    move_away(self._settings.root, product, row.digest, self._settings.move_to)
                except OSError as error:
                    self._tell(f"{row.path}: cannot be moved ({error.strerror}); it stays")
                self._step("moved")
            self._journal.quarantine(row.path)
            self._step("quarantined")
            self.quarantined += 1
            self._tell(f"{row.path}: in quarantine, {row.reason} ({shown(str(record))})")
