"""What an export holds besides weights is the source's own, but for what training changed."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml

from data.tokenizers.tokenizer import build_tokenizer
from model.rope import Rope
from parallel.layout import single_process_layout
from pretrain.checkpointing import checkpoint
from pretrain.checkpointing.folders import CARRIED, MANIFEST, find_published
from pretrain.checkpointing.manifest import read_manifest, to_text
from pretrain.checkpointing.model_files import contents_of, read_carried
from pretrain.checkpointing.progress import Progress
from pretrain.checkpointing.stored_tensors import read_whole_tensors, tensor_names
from pretrain.config.config_yaml import dump_yaml, read_config_yaml
from tests.huggingface import chat_folders as folders
from tools.export_hf import Arguments, export
from tools.huggingface.export_files import merge_config
from tools.huggingface.model_card import read_front_matter
from tools.import_hf import Arguments as ImportArguments
from tools.import_hf import import_folder
from tools.train_tokenizer import Arguments as TrainArguments
from tools.train_tokenizer import train_tokenizer


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def chat_templates(folder: Path) -> dict | str:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).chat_template


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A chat model with all that a folder may hold."""
    folder = tmp_path_factory.mktemp("source") / "hf"
    folders.write_model(folder, eos_token_id=[2, 0], bos_token_id=1, pad_token_id=3)
    folders.write_tokenizer(folder)
    folders.write_generation(folder)
    folders.edit_json(folder / "config.json", foo=3, _name_or_path="maker/model", use_cache=False)
    (folder / "LICENSE.txt").write_text("Do what you like.\n")
    (folder / "README.md").write_text(
        "---\nlicense: mit\nlanguage:\n- en\ntags:\n- old\n---\n# Old\n"
    )
    return folder


@pytest.fixture(scope="module")
def imported(source) -> Path:
    root = source.parent / "imported"
    import_folder(ImportArguments(hf=str(source), save=str(root)))
    return root


def continue_run(start: Path, root: Path, *, tokenizer=None, tokenizer_type=None, **phase) -> Path:
    """Save the weights of `start` again, as a run with other settings that began there would."""
    folder = find_published(start)
    config = read_config_yaml(str(folder / "config.yaml"))
    progress = Progress.read(folder)
    settings = progress.phase | phase
    progress = replace(progress, phase=settings, longest_seq_length=settings["seq_length"])
    files = [str(path) for path in sorted((folder / "tokenizer").iterdir())]
    if tokenizer_type is not None:
        config.data.tokenizer_type = tokenizer_type
        files = build_tokenizer(tokenizer_type, tokenizer, config.data.vocab_size).files
    names = tensor_names(folder)
    tensors = read_whole_tensors(folder, names)
    world = single_process_layout(torch.device("cpu")).world
    checkpoint.save(
        root,
        7,
        tensors,
        progress,
        dump_yaml(config),
        contents_of(files),
        world,
        carried=read_carried(folder),
    )
    return root


def test_an_unchanged_model_comes_back_with_all_its_files(source, imported, tmp_path, capsys):
    export(Arguments(load=str(imported), output=str(tmp_path / "out")))
    written = names_in(tmp_path / "out")
    expected = names_in(source)
    assert written == expected | {"ithaca_made.json"}
    others = expected - {"config.json", "model.safetensors", "additional_chat_templates"}
    others.remove("README.md")
    for name in sorted(others):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    theirs = read(source / "config.json")
    ours = read(tmp_path / "out" / "config.json")
    assert {name: ours[name] for name in theirs} == theirs
    assert "changed since the import" not in capsys.readouterr().out
    assert chat_templates(tmp_path / "out") == {"default": folders.CHAT, "tool": folders.TOOL_CHAT}


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_the_model_card_names_what_the_model_is_from(imported, tmp_path):
    export(Arguments(load=str(imported), output=str(tmp_path / "out")))
    assert front_matter(tmp_path / "out") == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "mit",
        "language": ["en"],
        "base_model": "maker/model",
        "tags": ["ithaca", "llama"],
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The weights of maker/model, not trained since; its model card is not repeated" in card
    export(Arguments(load=str(imported), output=str(tmp_path / "named"), base_model="my/start"))
    assert front_matter(tmp_path / "named")["base_model"] == "my/start"


@pytest.mark.parametrize(
    "theirs, ours, written, changes",
    [
        (
            "silu",
            "gelu_pytorch_tanh",
            "gelu_pytorch_tanh",
            ["hidden_act silu -> gelu_pytorch_tanh"],
        ),
        ("swish", "silu", "swish", []),
    ],
)
def test_the_activation_is_the_trained_one(theirs, ours, written, changes):
    trained = dict(hidden_act=ours, torch_dtype="float32")
    source = dict(hidden_act=theirs, torch_dtype="float32")
    assert merge_config(trained, source) == (source | {"hidden_act": written}, changes)


@pytest.mark.parametrize("line", [b"date: 2024-13-45", b"license: \xff", b"a: b: c"], ids=str)
def test_a_card_of_the_source_that_cannot_be_read_gives_nothing(line):
    assert read_front_matter(b"---\nlanguage: en\n" + line + b"\n---\n# Model\n") == {}


def test_what_an_import_leaves_behind_is_named(source, tmp_path, capsys):
    folder = tmp_path / "hf"
    shutil.copytree(source, folder)
    for name in (
        "modeling_x.py",
        "preprocessor_config.json",
        "pytorch_model.bin",
        ".gitattributes",
    ):
        (folder / name).write_text("")
    (folder / "original").mkdir()
    import_folder(ImportArguments(hf=str(folder), save=str(tmp_path / "save"), verify=False))
    lines = [line for line in capsys.readouterr().out.splitlines() if "not carried" in line]
    assert lines == [
        "not carried: modeling_x.py: code, which is never run",
        "not carried: pytorch_model.bin: weights in a format that is not read",
        "not carried: original/, preprocessor_config.json: neither the model nor its tokenizer "
        "needs it",
    ]


def test_generation_stops_where_the_sources_does(source, imported, tmp_path):
    from transformers import AutoModelForCausalLM

    export(Arguments(load=str(imported), output=str(tmp_path / "out")))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.to_dict()
    assert found == AutoModelForCausalLM.from_pretrained(source).generation_config.to_dict()
    assert found["eos_token_id"] == [2, 0]
    assert found["repetition_penalty"] == 1.05


def test_a_longer_context_is_changed_and_named(imported, tmp_path, capsys):
    rope = replace(Rope(), base=5e5)
    run = continue_run(imported, tmp_path / "run", seq_length=256, rope=asdict(rope))
    export(Arguments(load=str(run), output=str(tmp_path / "out"), dtype="bfloat16"))
    assert read(tmp_path / "out" / "config.json")["max_position_embeddings"] == 256
    assert read(tmp_path / "out" / "config.json")["rope_parameters"]["rope_theta"] == 5e5
    assert read(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"
    assert read(tmp_path / "out" / "tokenizer_config.json")["model_max_length"] == 256
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("changed since the import: ")]
    assert lines == [
        "changed since the import: max_position_embeddings 64 -> 256",
        "changed since the import: dtype float32 -> bfloat16",
        "changed since the import: rope base 10000 -> base 500000",
        "changed since the import: tokenizer: model_max_length 64 -> 256",
    ]
    assert read(tmp_path / "out" / "config.json")["eos_token_id"] == [2, 0]


def test_shorter_training_takes_no_context_away(imported, tmp_path, capsys):
    run = continue_run(imported, tmp_path / "run", seq_length=32)
    export(Arguments(load=str(run), output=str(tmp_path / "out")))
    assert read(tmp_path / "out" / "config.json")["max_position_embeddings"] == 64
    assert "changed since the import" not in capsys.readouterr().out


def test_older_spellings_of_the_source_do_not_contradict_the_export(source, tmp_path):
    from transformers import AutoConfig

    folder = tmp_path / "hf"
    folders.write_model(folder)
    folders.edit_json(
        folder / "config.json",
        rope_parameters=None,
        dtype=None,
        torch_dtype="float16",
        rope_theta=20000.0,
        rope_scaling={"type": "linear", "factor": 2.0},
    )
    import_folder(ImportArguments(hf=str(folder), save=str(tmp_path / "imported")))
    rope = asdict(Rope.make(30000.0, "linear", {"factor": 4.0}))
    run = continue_run(tmp_path / "imported", tmp_path / "run", seq_length=256, rope=rope)
    export(Arguments(load=str(run), output=str(tmp_path / "out")))
    found = AutoConfig.from_pretrained(tmp_path / "out")
    expected = {"rope_theta": 30000.0, "rope_type": "linear", "factor": 4.0}
    assert {name: found.rope_parameters[name] for name in expected} == expected
    assert found.dtype == torch.float32
    assert "dtype" not in read(tmp_path / "out" / "config.json")


def test_a_source_without_a_token_id_keeps_its_silence(tmp_path):
    """transformers has defaults by class; writing null for them would be another model."""
    folders.write_model(tmp_path / "hf")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        folders.edit_json(tmp_path / "hf" / "config.json", **{name: None})
    (tmp_path / "hf" / "generation_config.json").unlink()
    import_folder(ImportArguments(hf=str(tmp_path / "hf"), save=str(tmp_path / "imported")))
    export(Arguments(load=str(tmp_path / "imported"), output=str(tmp_path / "out")))
    assert not {"bos_token_id", "eos_token_id"} & read(tmp_path / "out" / "config.json").keys()
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_a_run_without_a_tokenizer_exports_the_sources(source, imported, tmp_path):
    run = continue_run(imported, tmp_path / "run", tokenizer_type="NullTokenizer")
    export(Arguments(load=str(run), output=str(tmp_path / "out")))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    assert chat_templates(tmp_path / "out")["tool"] == folders.TOOL_CHAT
    export(Arguments(load=str(run), output=str(tmp_path / "bare"), tokenizer=False))
    assert not (tmp_path / "bare" / "tokenizer.json").exists()
    assert read(tmp_path / "bare" / "generation_config.json")["eos_token_id"] == [2, 0]


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("spm")
    (folder / "text.txt").write_text("\n".join(folders.TEXT))
    return train_tokenizer(
        TrainArguments(
            input=[str(folder / "text.txt")], output_prefix=str(folder / "spm"), vocab_size=320
        )
    )


def test_sentencepiece_keeps_chat_templates_and_length_of_the_source(
    imported, sentencepiece_model, tmp_path, capsys
):
    run = continue_run(
        imported,
        tmp_path / "run",
        tokenizer=sentencepiece_model,
        tokenizer_type="SentencePieceTokenizer",
        seq_length=128,
    )
    export(Arguments(load=str(run), output=str(tmp_path / "out")))
    assert chat_templates(tmp_path / "out") == {"default": folders.CHAT, "tool": folders.TOOL_CHAT}
    assert read(tmp_path / "out" / "tokenizer_config.json")["model_max_length"] == 128
    assert read(tmp_path / "out" / "config.json")["eos_token_id"] == [2, 0]
    assert "tokenizer: model_max_length 64 -> 128" in capsys.readouterr().out


def test_inline_chat_templates_are_carried(imported, sentencepiece_model, tmp_path):
    folders.write_model(tmp_path / "hf")
    folders.write_tokenizer(tmp_path / "hf", chat_template=None)
    folders.edit_json(tmp_path / "hf" / "tokenizer_config.json", chat_template=folders.CHAT)
    import_folder(ImportArguments(hf=str(tmp_path / "hf"), save=str(tmp_path / "imported")))
    run = continue_run(
        tmp_path / "imported",
        tmp_path / "run",
        tokenizer=sentencepiece_model,
        tokenizer_type="SentencePieceTokenizer",
    )
    for number, load in enumerate((tmp_path / "imported", run)):
        export(Arguments(load=str(load), output=str(tmp_path / f"out{number}")))
        assert chat_templates(tmp_path / f"out{number}") == folders.CHAT


def test_a_model_that_began_here_gets_the_ids_of_its_tokenizer(
    imported, sentencepiece_model, tmp_path
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = continue_run(
        imported,
        tmp_path / "run",
        tokenizer=sentencepiece_model,
        tokenizer_type="SentencePieceTokenizer",
    )
    folder = find_published(run)
    for path in sorted((folder / CARRIED).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    listed = read_manifest(folder).files
    own = {name: value for name, value in listed.items() if not name.startswith(CARRIED)}
    (folder / MANIFEST).write_text(to_text(own))
    export(Arguments(load=str(run), output=str(tmp_path / "out")))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    assert expected == {"bos_token_id": 1, "eos_token_id": 2}
    assert read(tmp_path / "out" / "generation_config.json") == expected
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {name: getattr(model.config, name) for name in expected} == expected


def test_an_end_of_document_that_does_not_stop_generation_is_said(source, tmp_path, capsys):
    folder = tmp_path / "hf"
    folders.write_model(folder)
    folders.write_tokenizer(folder)
    folders.write_generation(folder, eos_token_id=[0])
    import_folder(ImportArguments(hf=str(folder), save=str(tmp_path / "imported")))
    export(Arguments(load=str(tmp_path / "imported"), output=str(tmp_path / "out")))
    assert "generation stops at [0], as the source says; documents in training ended with 2" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(max_position_embeddings=-5), "max_position_embeddings = -5: must be at least 1"),
        (dict(max_position_embeddings=0), "max_position_embeddings = 0: must be at least 1"),
        (dict(base_model="a\nb"), "base_model = a b: must be owner/model"),
        (dict(max_shard_bytes=0), "max_shard_bytes = 0: must be at least 1"),
        (dict(verify_text="text"), "verify_text = text: has an effect with --verify only"),
        (dict(verify_text="text", verify=True), "verify_text = text: is not text in UTF-8"),
    ],
)
def test_settings_that_no_export_can_have_are_one_line(
    imported, tmp_path, monkeypatch, settings, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=message) as error:
        export(Arguments(load=str(imported), output=str(tmp_path / "out"), **settings))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_export_over_what_it_reads_is_refused(imported, source, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("read")
    run = continue_run(imported, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]}
    for output, message in (
        (run, "is --load"),
        (run / "x" / "..", "is --load"),
        (run / "hf", "lies in --load"),
        (run / "iter_0000007", "lies in --load"),
        (tmp_path, "contains --load"),
        (run / "..", "contains --load"),
        (text, "is --verify-text"),
        (source, "was not made by tools.export_hf"),
        (source / "x", "lies in the run's tokenizer"),
    ):
        arguments = Arguments(
            load=str(run), output=str(output), overwrite=True, verify=True, verify_text=str(text)
        )
        with pytest.raises(ValueError, match=message):
            export(arguments)
    assert {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "text.txt"]
