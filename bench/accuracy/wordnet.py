"""Two tasks derived from the noun glosses of WordNet 3.0: a gloss's sense class, and whether a gloss is another's hypernym.

Synsets are told apart by their gloss: two with the same one count as one, so no text can be on both sides of a split.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

# lexicographer files of nouns less noun.Tops, which holds the roots of the other ones
CLASSES = (
    "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling", "food", "group",
    "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process", "quantity", "relation", "shape",
    "state", "substance", "time",
)  # fmt: skip
TOPS = 3  # number of noun.Tops; those of CLASSES follow
PAIRS_PER_HYPERNYM = 4  # of each label, so that "city" is not the answer everywhere


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

    The other gloss of a pair with label 0 belongs to a sibling or an aunt, and is a hypernym of something else. Every gloss is
    second as often with label 1 as with 0: the second text alone, however general, does not tell the label.
    """
    net = _Net(synsets)
    splits = {gloss: split_of(gloss) for gloss in net.parents.keys() | net.children.keys()}
    found = defaultdict(list)
    for parent in sorted(net.children, key=_order):
        yes, close = (
            sorted((g for g in glosses if splits[g] == splits[parent]), key=lambda gloss: _order(f"{gloss}\0{parent}"))
            for glosses in (net.children[parent], net.near(parent))
        )
        no = (gloss for gloss in close if not net.related(gloss, parent))
        for child, other in islice(zip(yes, no, strict=False), PAIRS_PER_HYPERNYM):
            found[splits[parent]] += [(child, parent, 1), (other, parent, 0)]
    return dict(found)


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
        """Siblings, and children of siblings."""
        siblings = {child for parent in self.parents.get(gloss, ()) for child in self.children[parent]} - {gloss}
        return siblings | {child for sibling in siblings for child in self.children.get(sibling, ())}

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
