"""The folder that train.sh watches is the one that the trainer saves in."""

import pytest

from launch.save_folder import save_folder


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--save", "a"], "a"),
        (["--save=a", "--save=b"], "b"),
        (["--lr", "1", "--config", "run.yaml"], "of the file"),
        (["--config=run.yaml", "--save", "of the flags"], "of the flags"),
        (["--save-interval", "5"], ""),
        (["--config", "missing.yaml"], ""),
        (["--config", "broken.yaml"], ""),
        (["--config"], ""),
        ([], ""),
    ],
)
def test_flags_win_over_the_file(tmp_path, monkeypatch, argv, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("lr: 1\nsave: 'of the file'  # where\n")
    (tmp_path / "broken.yaml").write_text("save: [")
    assert save_folder(argv) == expected


@pytest.mark.parametrize("text", ["- save\n", "lr: 1\n", "save: null\n", ""])
def test_a_file_without_a_folder_names_none(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert save_folder(["--config", str(file)]) == ""
