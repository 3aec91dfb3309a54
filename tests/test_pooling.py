"""Sentence encoders: their folders against sentence-transformers, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from minidistil import hub, weights
from minidistil.downstream.vectors import embed
from minidistil.errors import UserError
from minidistil.model import Config, LanguageModel
from minidistil.pooling import Pooling, SentenceEncoder, read_pooling, write_pooling
from minidistil.tokenizer import Tokenizer

TEXTS = ["ab cd ef", "a", "gh ab ab cd gh ef a b c d e f", "c d"]


def write(tiny, folder, pooling, family="bert"):
    """A random SentenceEncoder of the tiny vocabulary with this pooling, as train.py writes it."""
    tokenizer = Tokenizer.load(tiny / "teacher")
    types = 2 if family == "bert" else 0
    config = Config(len(tokenizer.vocab), 32, types, layers=2, heads=2, width=32, mlp_width=64, family=family)
    weights.save_model(folder, SentenceEncoder(config, seed=1))
    tokenizer.save(folder, family)
    write_pooling(folder, pooling, config)
    return folder


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("mode", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_folder_opens_in_sentence_transformers(mode, normalize, family, tiny, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    folder = write(tiny, tmp_path / "model", Pooling(mode, normalize, 8), family)
    model = library.SentenceTransformer(str(folder), device="cpu")
    assert model.max_seq_length == 8
    ours, theirs = embed(folder, TEXTS), model.encode(TEXTS)
    assert np.abs(ours - theirs).max() < 1e-5
    assert np.allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6) == normalize
    model.save(str(tmp_path / "again"))  # as this version of the library writes it
    assert read_pooling(folder) == Pooling(mode, normalize, 8)
    again = read_pooling(tmp_path / "again")
    assert dataclasses.replace(again, settings={}) == read_pooling(folder) and again.settings["similarity_fn_name"]
    assert np.abs(embed(tmp_path / "again", TEXTS) - ours).max() < 1e-5


def test_prompts_are_passed_on(tiny, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    settings = {"prompts": {"query": "ab "}, "default_prompt_name": "query", "similarity_fn_name": "cosine"}
    folder = write(tiny, tmp_path / "model", Pooling("mean", True, 32, settings))
    assert read_pooling(folder).settings == settings and read_pooling(folder).prompt == "ab "
    theirs = library.SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    assert np.abs(embed(folder, TEXTS, prefix="ab ") - theirs).max() < 1e-5


def test_a_model_in_0_transformer(tiny, tmp_path):
    """The folder as sentence-transformers 0.3 wrote it: found by its own name, and by that of its model."""
    folder = write(tiny, tmp_path / "old", Pooling("cls", False, 8))
    want = embed(folder, TEXTS)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "0_Transformer").mkdir()
    kept = {"modules.json", "1_Pooling", "0_Transformer", "config_sentence_transformers.json"}
    for path in list(folder.iterdir()):
        if path.name not in kept:
            path.rename(folder / "0_Transformer" / path.name)
    (folder / "modules.json").write_text(json.dumps(modules))
    place = hub.resolve(str(folder))
    assert place == hub.resolve(str(folder / "0_Transformer")) == folder / "0_Transformer"
    assert read_pooling(place) == Pooling("cls", False, 8)
    assert np.array_equal(embed(place, TEXTS), want)


def test_text_that_the_library_would_make_lower_case(tiny, tmp_path):
    """It does so before tokenisation: nothing new for a vocabulary without capitals, refused for any other."""
    folder = write(tiny, tmp_path / "model", Pooling("mean", True, 8))
    values = json.loads((folder / "sentence_bert_config.json").read_text()) | {"do_lower_case": True}
    (folder / "sentence_bert_config.json").write_text(json.dumps(values))
    assert read_pooling(folder) == Pooling("mean", True, 8)
    (folder / "tokenizer.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"do_lower_case": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="the vocabulary has capitals: make the text lower case"):
        read_pooling(folder)


def test_a_folder_that_says_nothing_is_pooled_by_the_mean(tiny):
    assert read_pooling(tiny / "teacher") == Pooling("mean", False, None)
    ids = torch.tensor([[2, 9, 10, 3]])
    hidden = weights.load_model(tiny / "teacher", kind=SentenceEncoder)(ids)
    assert torch.equal(Pooling()(hidden, torch.ones(1, 4, dtype=torch.bool)), hidden.sum(1) / 4)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            ("modules.json", [{"path": "", "type": "x.Transformer"}]),
            "lists Transformer: use a model of a Transformer, a",
        ),
        (("modules.json", [{"path": "", "type": "x.CLIPModel"}, {}]), "lists CLIPModel, None: use"),
        (("modules.json", []), "does not list modules"),
        (("modules.json", {"a": 1}), "not a JSON list"),
        (("1_Pooling/config.json", {"pooling_mode_max_tokens": True}), "it pools by max_tokens: use a model"),
        (
            ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}),
            "it pools by lasttoken: use a model that pools by mean",
        ),
        (("1_Pooling/config.json", {"pooling_mode": ["mean", "cls"]}), "it pools by mean, cls: use"),
        (("1_Pooling/config.json", {}), "it pools by nothing: use"),
        (("1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False}), "without its prompt: use"),
        (("1_Pooling/config.json", None), "is missing, which says how the model pools"),
    ],
)
def test_other_folders_are_refused(change, message, tiny, tmp_path):
    folder = write(tiny, tmp_path / "model", Pooling("mean", True, 8))
    name, contents = change
    (folder / name).unlink()
    if contents is not None:
        (folder / name).write_text(json.dumps(contents))
    with pytest.raises(UserError, match=message):
        read_pooling(folder)


def test_a_dense_layer_behind_the_pooling_is_refused(tiny, tmp_path):
    folder = write(tiny, tmp_path / "model", Pooling("mean", False, 8))
    modules = json.loads((folder / "modules.json").read_text())
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*modules, dense]))
    with pytest.raises(UserError, match="lists Transformer, Pooling, Dense"):
        read_pooling(folder)


def test_a_saved_encoder_is_transformers_bare_model(tiny, tmp_path):
    """BertModel, with the names that it has there, and our bits again; a head can be added to it."""
    transformers = pytest.importorskip("transformers")
    folder = write(tiny, tmp_path / "model", Pooling())
    ours = weights.load_model(folder, kind=SentenceEncoder)
    theirs, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(theirs).__name__ == "BertModel"
    assert {name.partition(".")[0] for name in info["missing_keys"]} <= {"pooler"} and not info["unexpected_keys"]
    ids, mask = torch.randint(5, 60, (3, 7)), torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    found, want = ours(ids, mask), theirs.eval()(ids, attention_mask=mask.long()).last_hidden_state
    assert (found - want)[mask].abs().max() < 1e-5
    with pytest.raises(UserError, match="has no masked-LM head"):
        weights.load_model(folder)
    headed = weights.load_model(folder, fresh_head=True)
    assert type(headed) is LanguageModel and headed.fresh_head
    assert torch.equal(headed(ids, mask), found)
