"""Two tasks derived from the noun glosses of WordNet 3.0: a gloss's sense class, and whether a gloss is another's hypernym.

Synsets are told apart by their gloss: two with the same one count as one, so no text can be on both sides of a split.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

# lexicographer files of nouns less noun.Tops, which holds the roots of the other ones
CLASSES = (
    "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling", "food", "group",
    "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process", "quantity", "relation", "shape",
    "state", "substance", "time",
)  # fmt: skip
TOPS = 3  # number of noun.Tops; those of CLASSES follow
PAIRS_PER_HYPERNYM = 4  # so that "city" is not the answer everywhere


@dataclass(frozen=True)
class Synset:
    """gloss: the definition without its examples; hypernyms: ids, without those of instances"""

    id: str
    file: int
    gloss: str
    hypernyms: tuple[str, ...]


def parse_nouns(data: str) -> Iterator[Synset]:
    """The synsets of a file `data.noun` (format: wndb(5WN))."""
    for line in data.strip("\n").split("\n"):
        if line.startswith(" "):  # the licence
            continue
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        at = 4 + 2 * int(fields[3], 16)  # behind the words
        pointers = fields[at + 1 : at + 1 + 4 * int(fields[at])]
        hypernyms = tuple(pointers[i + 1] for i in range(0, len(pointers), 4) if pointers[i] == "@")
        yield Synset(fields[0], int(fields[1]), definition(gloss), hypernyms)


def definition(gloss: str) -> str:
    """What stands before the first example: those contain the word itself."""
    return gloss.partition('"')[0].strip().rstrip(";:,").strip()


def supersenses(synsets: Iterable[Synset]) -> list[tuple[str, int]]:
    """(gloss, class) of every synset with a class and a gloss."""
    return [(s.gloss, s.file - TOPS - 1) for s in synsets if s.file > TOPS and s.gloss]


def hypernym_pairs(synsets: Iterable[Synset], split_of: Callable[[str], str]) -> dict[str, list[tuple[str, str, int]]]:
    """(gloss, other gloss, whether the other is the first one's hypernym) by split.

    split_of: split of a gloss; only pairs with both sides in one are made

    Labels alternate. The other gloss of a pair with label 0 belongs to a sibling or an aunt. Every gloss is first once at most,
    and only where it could have had either label.
    """
    net = _Net(synsets)
    splits = {gloss: split_of(gloss) for gloss in net.parents.keys() | net.children.keys()}
    used: Counter[str] = Counter()
    found: dict[str, tuple[list, list]] = defaultdict(lambda: ([], []))
    for child in sorted(net.parents, key=_order):
        parents = [gloss for gloss in net.parents[child] if splits[gloss] == splits[child] and used[gloss] < PAIRS_PER_HYPERNYM]
        near = [gloss for gloss in net.near(child) if splits[gloss] == splits[child]]
        parent = min(parents, key=partial(_order_after, child), default=None)
        other = next((g for g in sorted(near, key=partial(_order_after, child)) if not net.related(child, g)), None)
        if parent is None or other is None:
            continue
        yes, no = found[splits[child]]
        if len(yes) <= len(no):
            yes.append((child, parent, 1))
            used[parent] += 1
        else:
            no.append((child, other, 0))
    return {split: [pair for two in zip(*sides, strict=False) for pair in two] for split, sides in found.items()}


class _Net:
    """Hypernymy between glosses."""

    def __init__(self, synsets: Iterable[Synset]):
        by_id = {s.id: s for s in synsets}
        self.parents: dict[str, set[str]] = defaultdict(set)
        self.children: dict[str, set[str]] = defaultdict(set)
        for synset in by_id.values():
            for hypernym in synset.hypernyms:
                parent = by_id[hypernym].gloss
                if synset.gloss and parent and parent != synset.gloss:
                    self.parents[synset.gloss].add(parent)
                    self.children[parent].add(synset.gloss)

    def near(self, gloss: str) -> set[str]:
        """Siblings and aunts, and what else has one of their glosses."""
        elders = self.parents[gloss] | {top for parent in self.parents[gloss] for top in self.parents.get(parent, ())}
        return {child for elder in elders for child in self.children[elder]}

    def related(self, one: str, other: str) -> bool:
        """Whether one of the two is the other or above it."""
        return other in self._above(one) or one in self._above(other)

    def _above(self, gloss: str) -> set[str]:
        seen, todo = {gloss}, [gloss]
        while todo:
            new = self.parents.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen


def _order(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _order_after(first: str, second: str) -> str:
    return _order(f"{first}\0{second}")
