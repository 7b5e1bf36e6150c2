"""Glosses out of WordNet's file format, and pairs of them that stay in their split."""

from collections import Counter

from bench.accuracy.wordnet import CLASSES, PAIRS_PER_HYPERNYM, Synset, definition, hypernym_pairs, parse_nouns, supersenses

# in the format of wndb(5WN): three words, one pointer of a kind that is not wanted, an instance, and a root
FILE = """\
  1 This software and database is being provided to you, the LICENSEE
00000001 03 n 01 thing 0 001 ~ 00000002 n 0000 | that which is there
00000002 06 n 03 tool 0 hand_tool 1 aid 0 003 @ 00000001 n 0000 + 00000009 v 0101 ~ 00000003 n 0000 | what work is done with; "a tool"
00000003 06 n 01 Excalibur 0 002 @i 00000002 n 0000 @ 00000001 n 0000 | the sword of a king (of legend):
"""  # noqa: E501


def tree():
    """A root with six children, each with six of its own."""
    yield Synset("r", 3, "root", ())
    for i in range(6):
        yield Synset(f"{i}", 5, f"gloss {i}", ("r",))
        for j in range(6):
            yield Synset(f"{i}.{j}", 5, f"gloss {i} {j}", (f"{i}",))


def test_synsets_are_read():
    """Words are skipped by their hexadecimal count; hypernyms are those of classes, not of instances."""
    assert list(parse_nouns(FILE)) == [
        Synset("00000001", 3, "that which is there", ()),
        Synset("00000002", 6, "what work is done with", ("00000001",)),
        Synset("00000003", 6, "the sword of a king (of legend)", ("00000001",)),
    ]


def test_definitions_end_before_the_examples():
    assert definition('a vessel; "he filled it"; "and again"  ') == "a vessel"
    assert definition("a vessel; open") == "a vessel; open"


def test_supersenses_are_numbered_from_the_first_class():
    """Roots have no class."""
    classes = supersenses(parse_nouns(FILE))
    assert classes == [("what work is done with", 2), ("the sword of a king (of legend)", 2)]
    assert CLASSES[2] == "artifact" and len(CLASSES) == 25


def test_pairs_are_hypernyms_or_siblings_and_aunts():
    """As many of one as of the other, every gloss first once, and no hypernym second in too many."""
    (pairs,) = hypernym_pairs(tree(), lambda gloss: "train").values()
    up = {s.id: s.hypernyms for s in tree()}
    gloss = {s.gloss: s.id for s in tree()}
    seconds = Counter()
    for first, second, label in pairs:
        parents = up[gloss[first]]
        elders = {*parents, *(top for parent in parents for top in up[parent])}
        assert (gloss[second] in parents) == bool(label)
        if label:
            seconds[second] += 1
        else:
            assert gloss[second] not in elders and set(up[gloss[second]]) & elders
    assert [label for _, _, label in pairs] == [1, 0] * (len(pairs) // 2) and len(pairs) > 20
    assert len({first for first, _, _ in pairs}) == len(pairs)
    assert max(seconds.values()) == PAIRS_PER_HYPERNYM
    assert hypernym_pairs(tree(), lambda gloss: "train") == {"train": pairs}


def test_pairs_stay_on_their_side_of_the_split():
    """Both glosses of a pair are in its split; a hypernym whose children are elsewhere makes none."""
    found = hypernym_pairs(tree(), lambda gloss: "test" if gloss.endswith(("0", "1", "2")) else "train")
    assert set(found) == {"train", "test"}
    for split, pairs in found.items():
        for first, second, _ in pairs:
            assert {text.endswith(("0", "1", "2")) for text in (first, second)} == {split == "test"}


def test_equal_glosses_are_one():
    """A gloss that two synsets share never stands against itself, nor against a hypernym of either."""
    twins = [*tree(), Synset("x", 5, "gloss 0 0", ("1",))]
    (pairs,) = hypernym_pairs(twins, lambda gloss: "train").values()
    labels = {second: label for first, second, label in pairs if first == "gloss 0 0"}
    assert labels.get("gloss 0", 1) == labels.get("gloss 1", 1) == 1
    assert all(first != second for first, second, _ in pairs)
