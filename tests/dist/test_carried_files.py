"""A run that starts from an imported model keeps that model's small files in its checkpoints."""

import shutil

from pretrain.checkpointing.folders import find_published
from pretrain.checkpointing.manifest import verify_files
from pretrain.checkpointing.model_files import read_carried, read_model_files
from tests.huggingface import chat_folders as folders
from tests.dist.training import base_arguments, train, write_corpus
from tools.import_hf import Arguments, import_folder


def test_checkpoints_carry_the_files_of_the_model_also_after_a_restart(pool, tmp_path):
    source = folders.write_model(tmp_path / "hf", vocab_size=97, eos_token_id=[2, 0])
    folders.write_generation(source)
    import_folder(Arguments(hf=str(source), save=str(tmp_path / "imported")))
    expected = read_model_files(source)
    assert set(expected) == {"config.json", "generation_config.json"}

    corpus = write_corpus(tmp_path / "corpus")
    arguments = dict(
        save=str(tmp_path / "run"),
        pretrained_checkpoint=str(tmp_path / "imported"),
        hidden_size=16,
        ffn_hidden_size=24,
        num_attention_heads=2,
        num_query_groups=1,
        kv_channels=8,
        norm_epsilon=1e-6,
        untie_embeddings_and_output_weights=True,
    )
    for iterations in (1, 2):
        argv = base_arguments(corpus, train_iters=iterations, **arguments)
        assert pool.run(train, 2, argv) == ["done"] * 2
        folder = find_published(tmp_path / "run")
        assert folder.name == f"iter_{iterations:07d}"
        assert read_carried(folder) == expected
        assert verify_files(folder) == []
        # The restart reads its own checkpoint: the first source may be gone.
        shutil.rmtree(tmp_path / "imported", ignore_errors=True)
