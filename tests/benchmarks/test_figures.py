"""The page of the benchmarks tells what was measured, and no more."""

import pytest
from benchmarks import figures
from benchmarks.aims import AIMS, Aim

ROW = figures.figure([3.0, 1.0, 2.0], [4.0, 4.0], load=0.1, command="measure it", peer_name="peer 1.0")


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_the_committed_page_is_that_of_the_committed_results():
    assert figures.PAGE.read_text() == figures.page(), "run python -m benchmarks.figures"


def test_every_measured_figure_has_an_aim_and_every_aim_a_key_of_its_own():
    for area, aims in AIMS.items():
        keys = [aim.key for aim in aims]
        assert len(set(keys)) == len(keys)
        assert set(figures.read(area).figures) <= set(keys)


def test_a_figure_is_the_median_of_its_runs():
    assert (ROW.ours, ROW.peer, ROW.ratio, ROW.runs, ROW.spread) == (2.0, 4.0, 0.5, 3, 1.0)


def test_a_figure_that_nothing_is_held_against_is_refused(results):
    with pytest.raises(KeyError, match="no aim 'typo' in 'trainer'"):
        figures.record("trainer", {"typo": ROW})
    assert not results.exists()


def test_a_second_record_keeps_what_it_did_not_measure(results):
    figures.record("trainer", {"lora": ROW})
    figures.record("trainer", {"full": ROW.model_copy(update={"ours": 7.0})})
    assert {key: one.ours for key, one in figures.read("trainer").figures.items()} == {"lora": 2.0, "full": 7.0}
    assert figures.read("trainer").figures["lora"].machine == figures.machine()


@pytest.mark.parametrize(
    ("kind", "of", "ours", "ratio", "reached"),
    [
        ("at least", "ratio", 0.0, 1.2, True),
        ("at least", "ratio", 9.0, 1.19, False),
        ("at most", "ours", 1.2, 9.0, True),
        ("at most", "ours", 1.3, 0.0, False),
        ("at most", "ratio", 0.0, None, False),
    ],
)
def test_an_aim_is_reached_by_the_figure_that_it_speaks_of(kind, of, ours, ratio, reached):
    assert Aim("key", "what", "s", kind, 1.2, of).reached(ours, ratio) is reached


def test_a_missed_aim_is_told_with_its_reason_and_an_unmeasured_one_as_such(results, monkeypatch):
    slow = Aim("slow", "slow thing", "s", "at most", 0.4, why="It waits.")
    monkeypatch.setitem(AIMS, "trainer", (slow, Aim("later", "later thing", "s", "at most", 1, "ours")))
    monkeypatch.setitem(AIMS, "operator", ())
    figures.record("trainer", {"slow": ROW})
    told = figures.page()
    assert "| slow thing | at most 0.4x | 2 s | 4 s (peer 1.0) | 0.50 | **no** | 3, 100% |" in told
    assert "- **slow thing**: It waits." in told
    assert "| later thing | at most 1 s | not measured yet |" in told
    assert "`measure it`" in told


def test_the_picture_has_a_bar_for_each_ratio_and_the_same_bytes_twice(results, tmp_path):
    figures.record("trainer", {"lora": ROW})
    pictures = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for path in pictures:
        figures.picture(path)
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert b"LoRA, 4 x 512" in pictures[0].read_bytes()
