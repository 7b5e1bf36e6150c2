"""The benchmarks run, check what they time, and bring their own rows up to date and no others."""

import json

import pytest

from bench.__main__ import main


def rows_of(path) -> dict[str, list[dict]]:
    rows = json.loads(path.read_text())["rows"]
    return {name: [row for row in rows if row["benchmark"] == name] for name in {row["benchmark"] for row in rows}}


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("packed_lora", 16),
        pytest.param("merge", 3, marks=pytest.mark.slow),
        pytest.param("planner", 72, marks=pytest.mark.slow),
    ],
)
def test_rows_are_brought_up_to_date(name, rows, tmp_path, capsys):
    out = tmp_path / "results.json"
    stale = {"benchmark": name, "work": "stale"}
    other = {"benchmark": "another", "work": "kept"}
    out.write_text(json.dumps({"rows": [stale, other]}))
    main([name, "--rounds", "1", "--out", str(out)])
    found = rows_of(out)
    assert found.keys() == {name, "another"} and found["another"] == [other]
    assert len(found[name]) == rows and all(row["seconds"] > 0 and row["rounds"] == 1 for row in found[name])
    capsys.readouterr()
    main([name, "--table", "--out", str(out)])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + rows and all(line.count("|") == 8 for line in printed)


@pytest.mark.parametrize("arguments", [["nothing"], ["--table", "--out", "/nowhere.json"]])
def test_what_is_not_there(arguments):
    with pytest.raises(SystemExit, match=r"no benchmark nothing; there are budget, |nowhere\.json: no such file"):
        main(arguments)
