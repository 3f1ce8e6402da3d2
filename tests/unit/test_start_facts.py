"""pretrain/processes/start_facts.py: what one node tells the launcher of the run."""

import json

from launch.surroundings import RunFacts
from pretrain.processes.code_version import ROOT, source_digest
from pretrain.processes.start_facts import start_facts, tell_launcher
from tests.dist.training import base_arguments, write_corpus


def texts(argv: list[str]) -> dict[str, str]:
    """Collect all that must be the same, by name."""
    return {
        name: text for group in start_facts(argv)["groups"] for name, text in group["texts"].items()
    }


def test_settings_code_packages_and_files_are_told(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", documents=5)
    found = texts(base_arguments(corpus, clip_grad=0.5))
    assert found["clip_grad"] == "0.5"
    assert found["code"] == source_digest(ROOT)
    assert "version of torch" in found
    assert "bytes of .bin" in found[f"files of {corpus}"]


def test_a_corpus_that_is_not_there_is_told_and_no_problem_of_its_own(tmp_path):
    gone = str(tmp_path / "gone")
    found = start_facts(base_arguments(gone))
    assert found["problems"] == []
    assert texts(base_arguments(gone))[f"files of {gone}"].startswith(".bin cannot be read (")


def test_a_node_may_have_its_own_cache(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", documents=5)
    caches = [base_arguments(corpus, data_cache_path=f"/cache{number}") for number in range(2)]
    assert texts(caches[0]) == texts(caches[1])


def test_a_command_that_cannot_be_read_is_a_problem_with_the_code_beside_it():
    found = start_facts(["--no-such-flag", "1"])
    assert "no-such-flag" in found["problems"][0]
    assert [list(group["texts"])[-1] for group in found["groups"]] == ["code"]


def test_the_launcher_reads_what_is_told(tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus", documents=5)
    path = tmp_path / "facts.json"
    assert RunFacts.read(path) is None
    monkeypatch.setenv("ITHACA_FACTS", str(path))
    argv = base_arguments(corpus)
    tell_launcher(argv)
    run = RunFacts.read(path)
    assert [group.texts for group in run.groups] == [
        group["texts"] for group in json.loads(path.read_text())["groups"]
    ]
    assert run.shown["data"] == "1 corpus"
    assert run.notes["code"].startswith("commit ")
