"""Text of earlier requests, from which later ones may get candidates.

Nobody's text is kept unless the caller makes a pool and gives one of its namespaces to the requests. What one namespace
has learned is never proposed in another.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from threading import RLock

from .suffix import NOWHERE, STATE_BYTES, Match, SuffixAutomaton

CONTEXT = 16
"""Tokens of the prompt's end that are kept with an answer, so that its beginning can be found."""

YOUNGER, TEXT = 3 / 8, 1 / 4
"""Parts of a pool that a namespace may fill with the generation that learns, and with a text, which may overfill it."""

OLDER = YOUNGER + TEXT
"""And with the generation before it; both fit into the pool, so a namespace alone never has to forget."""

TOKEN_BYTES = 2 * STATE_BYTES + 4
"""Memory that one more token can take."""


class Generation:
    """Texts that will be forgotten together.

    Attributes:
        texts: as they were learned, oldest first.
        requests: that were learned from.
        automaton: over all of them.
    """

    def __init__(self) -> None:
        self.texts: list[array[int]] = []
        self.requests = 0
        self.automaton = SuffixAutomaton()
        self._tokens = 0

    def __len__(self) -> int:
        """Tokens of all texts."""
        return self._tokens

    @property
    def nbytes(self) -> int:
        """Memory, as an upper estimate; 0 where nothing was learned."""
        return self.automaton.nbytes + 4 * len(self) if self.requests else 0

    def add(self, text: Sequence[int]) -> None:
        """Learn a text; one that occurs in another takes no memory."""
        self.requests += 1
        match = NOWHERE
        for token in text:
            match = self.automaton.follow(match, token)
        if match[1] == len(text):
            return
        self.texts.append(array("i", text))
        self._tokens += len(text)
        self.automaton.begin()
        for token in text:
            self.automaton.add(token)

    def newest(self, max_bytes: float) -> Generation:
        """Itself, or a generation of its newest texts if it takes more than so many bytes."""
        kept: Generation = self
        while kept.nbytes > max_bytes and kept.texts:
            share = max_bytes / kept.nbytes
            texts = kept.texts[-int(share * len(kept.texts)) :] if share * len(kept.texts) >= 1 else []
            kept = Generation()
            for text in texts:
                kept.add(text)
            kept.requests = self.requests if texts else 0
        return kept


class Namespace:
    """The part of a pool that some requests share: one tenant's, say, or one application's.

    It has two generations. Texts join the younger one; when that is full or old enough, it becomes the older one, and
    what was the older one is forgotten.

    Args:
        pool: that it is part of.
        name: in that pool.

    Attributes:
        name: in its pool.
        vocab_size: of the model that it serves; 0 until there is one.
        younger, older: its generations.
        lock: held while it learns and while it is asked: models of several threads may share a namespace.
    """

    def __init__(self, pool: SharedPool, name: str) -> None:
        self.name = name
        self.vocab_size = 0
        self.younger, self.older = Generation(), Generation()
        self.lock = RLock()
        self._pool = pool
        self._closed = False

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return len(self.younger) + len(self.older)

    @property
    def nbytes(self) -> int:
        """Memory, as an upper estimate."""
        return self.younger.nbytes + self.older.nbytes

    def bind(self, vocab_size: int) -> None:
        """Serve a model.

        Raises:
            ValueError: it serves another one.
        """
        with self.lock:
            if self.vocab_size not in (0, vocab_size):
                raise ValueError(
                    f"namespace {self.name!r} is for a model with {self.vocab_size:,} tokens, and this one has "
                    f"{vocab_size:,}: take a namespace per tokenizer"
                )
            self.vocab_size = vocab_size

    def learn(self, text: Sequence[int], start: int = 0) -> None:
        """Remember a finished request; a namespace that its pool has removed does not.

        Args:
            text: token ids, prompt included.
            start: where the answer begins; of the prompt only the end is kept.

        Raises:
            ValueError: a token is not of the model's vocabulary.
        """
        kept = list(text[max(0, start - CONTEXT) :])
        if any(not 0 <= token < self.vocab_size for token in kept):
            raise ValueError(f"namespace {self.name!r} takes token ids from 0 to {self.vocab_size - 1:,}")
        room = self._pool.max_bytes
        with self.lock:
            if self._closed:
                return
            self.younger.add(kept[-int(TEXT * room / TOKEN_BYTES) :])
            if self.younger.nbytes > YOUNGER * room or self.younger.requests >= self._pool.max_age // 2:
                self.turn()
        self._pool.shrink(self)

    def keep(self, text: Sequence[int], start: int = 0) -> None:
        """As `learn`, and a text that it cannot take is left out: an answer is not lost because of what comes after."""
        if all(0 <= token < self.vocab_size for token in text[max(0, start - CONTEXT) :]):
            self.learn(text, start)

    def turn(self) -> None:
        """Begin a generation: what was the older one is forgotten. Nothing to do where the younger one is empty."""
        with self.lock:
            if self.younger.requests:
                self.younger, self.older = Generation(), self.younger

    def restore(self, younger: Generation, older: Generation) -> None:
        """Take over generations that were kept elsewhere; what has no room is left out, oldest first."""
        with self.lock:
            room = self._pool.max_bytes
            self.younger, self.older = younger.newest(YOUNGER * room), older.newest(OLDER * room)
        self._pool.shrink(self)

    def forget(self) -> int:
        """Let go of the older texts, or of all where none are older; returns the bytes that they took."""
        with self.lock:
            before = self.nbytes
            if self.older.requests:
                self.older = Generation()
            else:
                self.younger = Generation()
            return before - self.nbytes

    def close(self) -> None:
        """Forget all texts and learn no more. Requests that are running keep what they have been reading."""
        with self.lock:
            self._closed = True
            self.younger, self.older = Generation(), Generation()


class SharedPool:
    """Namespaces of text that finished requests have left.

    Args:
        max_bytes: memory of all namespaces together. A namespace keeps its newest third of that in any case; where all
            together have more, the one that learned longest ago forgets first.
        max_age: requests of a namespace after which a text has left it, unless it was learned again.

    Raises:
        TypeError: a bound is not an integer.
        ValueError: a bound is too small to keep anything.
    """

    def __init__(self, max_bytes: int = 64 << 20, max_age: int = 10_000) -> None:
        for name, value, least in (("max_bytes", max_bytes, 1 << 16), ("max_age", max_age, 2)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least:,}, got {value:,}")
        self.max_bytes = max_bytes
        self.max_age = max_age
        self._namespaces: dict[str, Namespace] = {}
        self._lock = RLock()

    @property
    def namespaces(self) -> dict[str, Namespace]:
        """All namespaces by name, the one that learned longest ago first."""
        with self._lock:
            return dict(self._namespaces)

    @property
    def nbytes(self) -> int:
        """Memory, as an upper estimate."""
        return sum(namespace.nbytes for namespace in self.namespaces.values())

    def namespace(self, name: str) -> Namespace:
        """The namespace of that name, which is made if there is none.

        Raises:
            TypeError, ValueError: the name is not a text, or empty.
        """
        if not isinstance(name, str):
            raise TypeError(f"a namespace has a text for its name, got {name!r}")
        if not name:
            raise ValueError("a namespace needs a name: give one per tenant or application")
        with self._lock:
            if name not in self._namespaces:
                self._namespaces[name] = Namespace(self, name)
            return self._namespaces[name]

    def remove(self, name: str) -> None:
        """Forget a namespace and all its text, whoever holds it; one that is not there is no error."""
        with self._lock:
            removed = self._namespaces.pop(name, None)
        if removed is not None:
            removed.close()

    def shrink(self, newest: Namespace) -> None:
        """Make room after a namespace has learned."""
        with self._lock:
            if self._namespaces.get(newest.name) is newest:
                self._namespaces[newest.name] = self._namespaces.pop(newest.name)
            excess = self.nbytes - self.max_bytes
            for namespace in list(self._namespaces.values()):
                while excess > 0 and (freed := namespace.forget()):
                    excess -= freed
                if excess <= 0:
                    break


class SharedText:
    """A reader of a namespace: matches in the generations that there were when it was made.

    Args:
        namespace: whose text is searched.
    """

    def __init__(self, namespace: Namespace) -> None:
        with namespace.lock:
            self._automatons = [g.automaton for g in (namespace.younger, namespace.older) if g.requests]
        self._lock = namespace.lock

    def start(self) -> tuple[Match, ...]:
        """Matches of no text."""
        return (NOWHERE,) * len(self._automatons)

    def follow(self, matches: tuple[Match, ...], tokens: Iterable[int]) -> tuple[Match, ...]:
        """Matches of some more tokens."""
        with self._lock:
            for token in tokens:
                matches = tuple([a.follow(m, token) for a, m in zip(self._automatons, matches, strict=True)])
        return matches

    def continuations(self, matches: tuple[Match, ...], most: int) -> list[tuple[int, int]]:
        """What followed, with the length of the match: longest first, and of one length the younger text's first."""
        with self._lock:
            found = [a.continuations(m, most) for a, m in zip(self._automatons, matches, strict=True)]
        if len(found) < 2:
            return found[0] if found else []
        longest: dict[int, int] = {}
        for token, length in sorted((pair for pairs in found for pair in pairs), key=lambda pair: -pair[1]):
            longest.setdefault(token, length)
        return list(longest.items())[:most]
