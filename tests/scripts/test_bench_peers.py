"""The benchmark beside the peers: the runner on toy contestants, the ratios, and the page."""

import json
import subprocess
import sys

import pytest
from paths import BENCH, TESTS

PEERS = BENCH / "peers"


@pytest.fixture(scope="module")
def modules():
    """The runner's modules, importable by their own names as `run.py` sees them."""
    sys.path[:0] = [str(PEERS), str(TESTS)]
    import conduct
    import contest
    import report
    import toy_contest

    yield {"conduct": conduct, "contest": contest, "report": report, "toy": toy_contest}
    for folder in (PEERS, TESTS):
        sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def toy(modules, tmp_path_factory):
    """The rows of the toy contest, and the results that they are stored in."""
    folder = tmp_path_factory.mktemp("bench")
    patch = pytest.MonkeyPatch()
    # The children find the toy beside the tests.
    patch.setenv("PYTHONPATH", str(TESTS))
    (problem,) = modules["toy"].PROBLEMS
    limits = modules["conduct"].Limits(size="quick", rounds=3, seconds=1.0, timeout=2.0, logs=folder / "logs")
    rows = modules["conduct"].conduct("toy_contest", problem, limits, folder, say=lambda line: None)
    patch.undo()
    results = modules["report"].load(folder / "none.json")
    machine = {"processor": "P", "cores": 2, "memory_gb": 4.0, "system": "S", "threads": 1, "load": 0.1, "date": "D"}
    modules["report"].store(results, problem, rows, limits, machine, {"torch": "2"})
    return {(row["name"], row["task"]): row for row in rows}, results, folder


def test_a_right_answer_is_ok_and_a_wrong_one_is_wrong(toy):
    rows, _, _ = toy
    assert rows["bilevel Sum", "add"]["status"] == "ok"
    assert rows["bilevel Sum", "add"]["error"] == 0.0
    assert rows["wrong peer", "add"]["status"] == "wrong"
    assert rows["wrong peer", "add"]["error"] == pytest.approx(1 / 5**0.5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("broken peer", "ImportError: no module named 'peer'"),
        ("dead peer", "the process ended with exit status 3 in `first`"),
        ("hanging peer", "no answer to `first` within 2 s"),
    ],
)
def test_who_fails_becomes_a_row_with_the_reason(toy, name, reason):
    rows, _, _ = toy
    assert rows[name, "add"]["status"] == "does not run"
    assert rows[name, "add"]["reason"] == reason


def test_a_task_that_a_contestant_lacks_is_no_row(toy):
    rows, _, _ = toy
    assert ("slow peer", "half") not in rows
    assert rows["bilevel Sum", "half"]["status"] == "ok"


def test_times_are_medians_of_the_rounds_for_each_result(toy):
    rows, _, _ = toy
    row = rows["slow peer", "add"]
    assert row["rounds"] == 3
    assert row["wall"] == sorted(row["wall_all"])[1]
    assert 0.01 <= row["wall"] < 0.02, "one of two results of a call that sleeps 0.02 s"
    assert row["peak"] > 0
    assert row["memory"] >= 0


def test_asked_ratios_count_right_rivals_alone(toy):
    _, results, _ = toy
    first, missing, unmatched = results["contests"]["toy, 1 thread"]["asked"]
    assert (first["entry"], first["rival"], first["verdict"]) == ("bilevel Sum", "slow peer", "reached")
    assert first["measured"] > 2
    assert missing["verdict"] == "our entry does not run or is wrong"
    assert missing["measured"] is None
    assert unmatched["verdict"] == "no rival runs and is right"


@pytest.mark.parametrize(
    ("measured", "at_least", "aim", "words"),
    [
        (5.0, 4.0, 10.0, "reached"),
        (12.0, 4.0, 10.0, "aim reached"),
        (3.0, 4.0, None, "missed"),
        (0.5, 4.0, None, "missed, the peer wins"),
        (0.5, None, None, "the peer wins"),
        (0.5, 0.3, None, "reached, the peer wins"),
        (1.5, None, None, "ahead"),
    ],
)
def test_the_verdict_says_who_wins(modules, measured, at_least, aim, words):
    assert modules["report"].verdict(measured, at_least, aim) == words


def test_a_ratio_is_the_median_over_rounds_not_the_ratio_of_medians(modules):
    rival, ours = {"cpu_all": [2.0, 40.0, 9.0], "cpu": 9.0}, {"cpu_all": [1.0, 10.0, 3.0], "cpu": 3.0}
    assert modules["report"].ratio(rival, ours, "cpu") == 3.0


def test_a_task_won_by_a_peer_is_said(modules, toy):
    _, results, _ = toy
    contest = json.loads(json.dumps(results["contests"]["toy, 1 thread"]))
    for row in contest["rows"]:
        if row["name"] == "bilevel Sum":
            row["cpu"] = 1e3
    (sentence, *_) = modules["report"].wins_of_peers({"toy": contest})
    assert sentence.startswith("toy, one sum: slow peer is ")


def test_results_survive_a_file_and_the_page_shows_every_row(modules, toy):
    rows, results, folder = toy
    modules["report"].write(folder / "benchmarks.json", folder / "benchmarks.md", results)
    assert modules["report"].load(folder / "benchmarks.json") == results
    page = (folder / "benchmarks.md").read_text()
    for name, _ in rows:
        assert name in page
    assert "does not run: no answer to `first` within 2 s" in page
    assert "**wrong**" in page
    assert "**Quick size**, for which nothing is asked: toy, 1 thread." in page
    assert "Not here: shy peer: does not add." in page


def test_some_rows_are_measured_again_and_the_others_stay(modules, toy):
    rows, results, _ = toy
    results = json.loads(json.dumps(results))
    (problem,) = modules["toy"].PROBLEMS
    limits = modules["conduct"].Limits(size="quick", tasks=("add",), who=("slow*",))
    again = rows["slow peer", "add"] | {"cpu": 7.0}
    machine = {"date": "E"}
    modules["report"].store(results, problem, [again], limits, machine, {})
    contest = results["contests"]["toy, 1 thread"]
    assert [row["name"] for row in contest["rows"]] == [name for name, _ in rows]
    assert [row.get("again") for row in contest["rows"] if row["cpu" if "cpu" in row else "name"] == 7.0] == ["E"]
    assert contest["machine"]["date"] == "D"


def test_a_time_that_is_asked_is_what_the_entry_needs_more_than_the_best_rival(modules):
    asked = modules["contest"].Asked("t", ["ours"], ["peer"], at_most=1.5)
    row = {"task": "t", "status": "ok", "error": 0.0, "first_cpu": 9.0}
    ours, peer = row | {"name": "ours", "ours": True, "cpu": 3.0}, row | {"name": "peer", "ours": False, "cpu": 2.0}
    judge = modules["report"].judge
    assert (judge(asked, [ours, peer])["measured"], judge(asked, [ours, peer])["verdict"]) == (1.0, "reached")
    alone = modules["contest"].Asked("t", ["ours"], [], measure="first_cpu", at_most=8.0)
    assert (judge(alone, [ours, peer])["measured"], judge(alone, [ours, peer])["verdict"]) == (9.0, "missed")


def test_a_reference_is_computed_once(modules, toy):
    _, _, folder = toy
    (problem,) = modules["toy"].PROBLEMS
    kept = folder / "toy-quick-0.json"
    content = json.loads(kept.read_text())
    kept.write_text(json.dumps(content | {"answers": {"add": [7.0]}}))
    limits = modules["conduct"].Limits(size="quick")
    assert modules["conduct"].reference("toy_contest", problem, limits, folder) == {"add": [7.0]}


def test_all_problems_load_without_the_peers_and_without_torch():
    code = (
        "import sys; from run import MODULES; import importlib\n"
        "problems = [p for module in MODULES.values() for p in importlib.import_module(module).PROBLEMS]\n"
        "for p in problems:\n"
        "    names = [c.name for c in p.contestants]\n"
        "    assert len(set(names)) == len(names) and set(p.sizes) == {'full', 'quick'}, p.key\n"
        "    assert all(a.task in p.tasks for a in p.asked), p.key\n"
        "heavy = {'torch', 'jax', 'bilevel', 'higher', 'torchopt'} & set(sys.modules)\n"
        "assert len(problems) == 22 and not heavy, (len(problems), heavy)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=PEERS, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
