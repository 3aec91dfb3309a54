"""Checkpoints: read and written as transformers does, whatever names they have, and refused in one line if damaged."""

import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import struct

import numpy as np
import pytest
import torch

from minidistil import weights
from minidistil.downstream.heads import Classifier, load_pretrained
from minidistil.errors import UserError
from minidistil.families import FAMILIES
from minidistil.hub import resolve
from minidistil.model import BERT_BASE, Config, LanguageModel, num_params
from minidistil.pooling import SentenceEncoder
from minidistil.safetensors import read_safetensors, write_safetensors
from minidistil.student import student_from_teacher, student_layers
from minidistil.weights import load_model, read_config, read_weights, save_model, write_config

BERT = Config(vocab_size=11, positions=5, layers=2, heads=2, width=4, mlp_width=6)
DISTILBERT = BERT.student(2)
GPT2 = dataclasses.replace(BERT, family="gpt2", token_types=0, norm_eps=1e-5)
ROBERTA = dataclasses.replace(BERT, family="roberta", token_types=1, pad_id=1, norm_eps=1e-5)
BOTH = pytest.mark.parametrize("config", [BERT, DISTILBERT], ids=["bert", "distilbert"])
MUTATIONS = 500  # of each kind of file


def random_model(config, seed=0):
    """Returns a model whose every weight is random, biases and norms included, in eval mode."""
    model = LanguageModel(config, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.2
    return model


@pytest.fixture
def folder(tmp_path):
    """A folder with a saved random BERT."""
    save_model(tmp_path, random_model(BERT))
    return tmp_path


def stored(folder):
    """Returns the tensors of a folder's model.safetensors, in memory of their own."""
    return {name: tensor.clone() for name, tensor in read_safetensors(folder / "model.safetensors")[0].items()}


def rewrite(folder, tensors):
    write_safetensors(folder / "model.safetensors", tensors)


def assert_same(model, other):
    first, second = model.state_dict(), other.state_dict()
    assert model.config == other.config and first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype == torch.float32 and torch.equal(first[name], second[name]), name


def refused(call, *wanted):
    """Asserts that `call()` raises a UserError of one line with all the words `wanted`."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and ": " in message
    for word in wanted:
        assert word in message, message


# ---- safetensors files


ODD_TENSORS = {
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "bf16": torch.randn(3, 2).bfloat16(),
    "fp16": torch.randn(5).half(),
    "fp64": torch.randn(2, 1, 2, dtype=torch.float64),
    "int64": torch.tensor([2**62, -1]),
    "int32": torch.arange(3, dtype=torch.int32),
    "uint8": torch.arange(7, dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "turned": torch.arange(6.0).view(2, 3).T,
    'a "name" \\ \u00fc \n': torch.ones(1),
}


@pytest.mark.parametrize("checksum", [False, True])
def test_safetensors_round_trip(tmp_path, checksum):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, ODD_TENSORS, {"note": '"sha256":"' + "0" * 64 + '"'}, checksum=checksum)
    tensors, metadata = read_safetensors(path, checksum=checksum)
    assert tensors.keys() == ODD_TENSORS.keys()
    for name, tensor in ODD_TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name
    assert metadata.pop("note") == '"sha256":"' + "0" * 64 + '"' and metadata.pop("format") == "pt"
    assert set(metadata) == ({"sha256"} if checksum else set())
    first = path.read_bytes()
    header = int.from_bytes(first[:8], "little")
    assert header % 8 == 0
    write_safetensors(path, dict(reversed(ODD_TENSORS.items())), {"note": '"sha256":"' + "0" * 64 + '"'}, checksum)
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_safetensors_agrees_with_the_library(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    tensors = {name: tensor.contiguous() for name, tensor in ODD_TENSORS.items()}
    write_safetensors(tmp_path / "ours", tensors, {"a": "b"}, checksum=True)
    library.save_file(tensors, tmp_path / "theirs", {"c": "d"})
    loaded = library.load_file(tmp_path / "ours")
    ours, metadata = read_safetensors(tmp_path / "theirs")
    assert metadata == {"c": "d"} and loaded.keys() == ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor) and torch.equal(ours[name], tensor), name
        assert loaded[name].dtype == ours[name].dtype == tensor.dtype


def file_of(header, data=b"", length=None):
    """Returns the bytes of a safetensors file with this header (bytes, or an object for JSON)."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BAD_FILES = {
    "empty": b"",
    "seven bytes": b"\2\0\0\0\0\0\0",
    "no header": struct.pack("<Q", 2),
    "cut header": file_of({"a": entry()}, length=1000),
    "length over the limit": file_of(b"{}", length=100_000_001),
    "length of -1": file_of(b"{}", length=2**64 - 1),
    "empty header": file_of(b""),
    "not JSON": file_of(b"{nonsense}"),
    "not UTF-8": file_of(b'{"\xff": 1}'),
    "UTF-16": file_of("{}".encode("utf-16-le")),
    "byte order mark": file_of(b"\xef\xbb\xbf{}"),
    "array": file_of([]),
    "number": file_of(b"1"),
    "leading space": file_of(b" {}"),
    "text after": file_of(b"{} {}"),
    "deep lists": file_of(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "deep objects": file_of(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "unclosed lists": file_of(b'{"a":' + b"[" * 200_000),
    "doubled tensor": file_of(b'{"a":%b,"a":%b}' % (2 * (json.dumps(entry()).encode(),)), b"\0" * 4),
    "doubled key": file_of(b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
    "doubled metadata": file_of(b'{"__metadata__":{"a":"b","a":"b"}}'),
    "metadata of numbers": file_of({"__metadata__": {"a": 1}}),
    "metadata list": file_of({"__metadata__": []}),
    "entry null": file_of({"a": None}),
    "entry list": file_of({"a": ["F32", [1], [0, 4]]}, b"\0" * 4),
    "no shape": file_of({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"\0" * 4),
    "unknown key": file_of({"a": {**entry(), "b": 1}}, b"\0" * 4),
    "unknown dtype": file_of({"a": entry("F31")}, b"\0" * 4),
    "dtype in lower case": file_of({"a": entry("f32")}, b"\0" * 4),
    "dtype null": file_of({"a": entry(None)}, b"\0" * 4),
    "dtype list": file_of({"a": entry(["F32"])}, b"\0" * 4),
    "shape number": file_of({"a": {**entry(), "shape": 1}}, b"\0" * 4),
    "shape of true": file_of({"a": entry(shape=[True])}, b"\0" * 4),
    "shape of 1.0": file_of({"a": entry(shape=[1.0])}, b"\0" * 4),
    "shape of text": file_of({"a": entry(shape=["1"])}, b"\0" * 4),
    "negative shape": file_of({"a": entry(shape=[-1])}, b"\0" * 4),
    "two negatives": file_of({"a": entry(shape=[-1, -1])}, b"\0" * 4),
    "NaN": file_of(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"\0" * 4),
    "Infinity": file_of(b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}', b"\0" * 4),
    "2^64 elements": file_of({"a": entry(shape=[2**32, 2**32])}, b"\0" * 4),
    "2^62 x 4 bytes": file_of({"a": entry(shape=[2**62])}, b"\0" * 4),
    "huge beside zero": file_of({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}),
    "huge integer": file_of({"a": entry(shape=[10**100])}, b"\0" * 4),
    "integer of 5000 digits": file_of(b'{"a":{"dtype":"F32","shape":[%b],"data_offsets":[0,4]}}' % (b"9" * 5000)),
    "million dimensions": file_of({"a": entry(shape=[2] * 10**6)}, b"\0" * 4),
    "65 dimensions": file_of({"a": entry(shape=[1] * 65)}, b"\0" * 4),
    "too few bytes": file_of({"a": entry(shape=[2])}, b"\0" * 4),
    "too many bytes": file_of({"a": entry(offsets=[0, 8])}, b"\0" * 8),
    "three offsets": file_of({"a": entry(offsets=[0, 4, 8])}, b"\0" * 8),
    "one offset": file_of({"a": entry(offsets=[4])}, b"\0" * 4),
    "offset true": file_of({"a": entry("U8", offsets=[0, True])}, b"\0"),
    "offset 4.0": file_of({"a": entry(offsets=[0, 4.0])}, b"\0" * 4),
    "negative offset": file_of({"a": entry(offsets=[-4, 0])}, b"\0" * 4),
    "reversed offsets": file_of({"a": entry(offsets=[4, 0])}, b"\0" * 4),
    "beyond the file": file_of({"a": entry(shape=[100], offsets=[0, 400])}, b"\0" * 4),
    "far beyond the file": file_of({"a": entry(shape=[2**40], offsets=[0, 2**42])}, b"\0" * 4),
    "hole at the start": file_of({"a": entry(offsets=[4, 8])}, b"\0" * 8),
    "hole": file_of({"a": entry(), "b": entry(offsets=[8, 12])}, b"\0" * 12),
    "overlap": file_of({"a": entry(), "b": entry(offsets=[2, 6])}, b"\0" * 6),
    "shared bytes": file_of({"a": entry(), "b": entry()}, b"\0" * 4),
    "empty tensor inside another": file_of({"a": entry(), "b": entry(shape=[0], offsets=[2, 2])}, b"\0" * 4),
    "trailing bytes": file_of({"a": entry()}, b"\0" * 5),
    "data without tensors": file_of(b"{}", b"\0"),
    "cut data": file_of({"a": entry()}, b"\0" * 3),
}


BAD_LENGTHS = ["empty", "seven bytes", "no header", "cut header", "length over the limit", "length of -1"]


@pytest.mark.parametrize("case", BAD_FILES)
def test_damaged_safetensors_are_refused(tmp_path, case):
    path = tmp_path / "x.safetensors"
    path.write_bytes(BAD_FILES[case])
    fault = "a header of" if case in BAD_LENGTHS else "damaged"
    refused(lambda: read_safetensors(path), str(path), "damaged", fault)


def test_header_over_the_limit_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001) + b"{}")
    os.truncate(path, 200_000_000)  # a hole: takes no room
    refused(lambda: read_safetensors(path), str(path), "damaged", "a header of 100000001 bytes")


def test_unusual_safetensors_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(b"{}"))
    assert read_safetensors(path) == ({}, {})
    # odd header length: unaligned data; offsets in another order than the names; trailing spaces
    header = json.dumps({"b": entry(offsets=[4, 8]), "a": entry(shape=[], offsets=[0, 4])}).encode()
    header += b" " * (1 + len(header) % 2)
    path.write_bytes(file_of(header, struct.pack("<2f", 1.5, 2.5)))
    tensors, _ = read_safetensors(path)
    assert tensors["a"].item() == 1.5 and tensors["a"].shape == () and tensors["b"].tolist() == [2.5]


def test_git_lfs_pointer_is_recognised(folder):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 440449768\n"
    (folder / "model.safetensors").write_text(pointer)
    refused(lambda: load_model(folder), "model.safetensors", "Git LFS pointer")


def test_reading_is_lazy_and_never_changes_the_file(folder):
    path = folder / "model.safetensors"
    before = path.read_bytes()
    tensors, _ = read_safetensors(path)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == 1  # all views of one map
    for parameter in load_model(folder).parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes  # memory of its own, not the map's
        with torch.no_grad():
            parameter.add_(1)
    assert path.read_bytes() == before


def test_a_file_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    """As by a run that saves: whoever has opened the file reads its old contents to the end."""
    path, map_file = tmp_path / "x.safetensors", np.memmap
    old, new = {"a": torch.zeros(3)}, {"a": torch.ones(3)}
    write_safetensors(path, old, checksum=True)

    def replaced_first(*given, **named):
        write_safetensors(path, new, checksum=True)
        return map_file(*given, **named)

    monkeypatch.setattr(np, "memmap", replaced_first)
    assert torch.equal(read_safetensors(path, checksum=True)[0]["a"], old["a"])
    monkeypatch.undo()
    assert torch.equal(read_safetensors(path, checksum=True)[0]["a"], new["a"])


def test_checksum_is_demanded(folder):
    path = folder / "model.safetensors"
    refused(lambda: read_safetensors(path, checksum=True), str(path), "damaged", "checksum")
    for digest in ("", "0" * 63, "g" * 64, "A" * 64):
        write_safetensors(path, {}, {"sha256": digest})
        refused(lambda: read_safetensors(path, checksum=True), str(path), "damaged", "checksum")


# ---- models: names


@BOTH
def test_model_round_trip_is_bitwise(tmp_path, config):
    model = random_model(config)
    save_model(tmp_path, model)
    assert_same(load_model(tmp_path), model)
    assert not load_model(tmp_path).training
    assert all(parameter.requires_grad for parameter in load_model(tmp_path).parameters())


@BOTH
def test_transformers_loads_what_we_save_and_back(tmp_path, config):
    transformers = pytest.importorskip("transformers")
    model = random_model(config)
    save_model(tmp_path, model)
    theirs, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs).__name__ == f"{FAMILIES[config.family].architecture}ForMaskedLM"
    assert theirs.dtype == torch.float32
    ids = torch.randint(config.vocab_size, (3, 5))
    torch.testing.assert_close(model.logits(model(ids)), theirs.eval()(ids).logits, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(load_model(tmp_path / "theirs"), model)
    # what we write is what they write: the same tensors, and no setting of which they would think otherwise
    assert stored(tmp_path).keys() == stored(tmp_path / "theirs").keys()
    ours, their = (json.loads((p / "config.json").read_text()) for p in (tmp_path, tmp_path / "theirs"))
    assert {key: value for key, value in ours.items() if key in their} == {
        key: value for key, value in their.items() if key in ours
    }


@pytest.mark.parametrize("config, count", [(BERT_BASE, 202), (BERT_BASE.student(6), 105), (BERT_BASE.student(12), 201)])
def test_names_and_shapes_of_base_models_are_those_of_transformers(tmp_path, config, count):
    transformers = pytest.importorskip("transformers")
    write_config(tmp_path, config)
    with torch.device("meta"):
        ours = LanguageModel(config).state_dict()
        theirs = transformers.AutoModelForMaskedLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    shapes = {}
    for name, group in weights._names(config, ours).items():
        shapes |= {their_name: part.shape for their_name, part in zip(group, ours[name].chunk(len(group)), strict=True)}
    assert len(shapes) == count
    tied = [name for name, _ in FAMILIES[config.family].tied]
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items() if name not in tied}


def bert_names(name):
    """Old and foreign names: gamma and beta."""
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


RENAMES = {
    "gamma and beta": bert_names,
    "no prefix": lambda name: re.sub(r"^(bert|distilbert)\.", "", name),
    "module.": lambda name: "module." + name,
    "module. without the other": lambda name: "module." + re.sub(r"^(bert|distilbert)\.", "", name),
    "all at once": lambda name: "module." + bert_names(name),
    "compiled": lambda name: "_orig_mod." + name,
    "compiled, parallel": lambda name: "_orig_mod.module." + name,
    "parallel, compiled": lambda name: "module._orig_mod." + name,
    "Lightning, compiled, parallel": lambda name: "model._orig_mod.module." + bert_names(name),
    "the encoder twice in a wrapper": lambda name: re.sub(r"^(bert|distilbert)\.", r"\1.model.\1.", name),
    "a part of it compiled": lambda name: re.sub(r"(layer\.\d+)", r"\1._orig_mod", name),
    "parts under FSDP": lambda name: "_fsdp_wrapped_module." + re.sub(
        r"(layer\.\d+)", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module", name),
    "an attribute of any name": lambda name: "my.network." + name,
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("rename", RENAMES)
def test_foreign_names_are_understood(tmp_path, config, rename):
    model = random_model(config)
    save_model(tmp_path, model)
    rewrite(tmp_path, {RENAMES[rename](name): tensor for name, tensor in stored(tmp_path).items()})
    assert_same(load_model(tmp_path), model)


def test_tensors_without_use_are_ignored(folder):
    model = load_model(folder)
    extra = {
        "bert.embeddings.position_ids": torch.arange(5)[None],
        "bert.pooler.dense.weight": torch.ones(4, 4),
        "bert.pooler.dense.bias": torch.ones(4),
        "cls.seq_relationship.weight": torch.ones(2, 4),
        "cls.seq_relationship.bias": torch.ones(2),
        "classifier.weight": torch.ones(3, 4),
        "classifier.bias": torch.ones(3),
        "qa_outputs.weight": torch.full((2, 4), torch.nan),
        "fit_dense.weight": torch.ones(6, 4),
        "module.fit_denses.0.weight": torch.ones(6, 4),
        "fit_denses.12.bias": torch.ones(6),
    }
    rewrite(folder, stored(folder) | extra)
    assert_same(load_model(folder), model)


@pytest.mark.parametrize(
    "config, copy, original",
    [
        (BERT, "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        (BERT, "cls.predictions.decoder.bias", "cls.predictions.bias"),
        (DISTILBERT, "vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),
    ],
)
def test_tied_copies_must_agree(tmp_path, config, copy, original):
    model = random_model(config)
    save_model(tmp_path, model)
    tensors = stored(tmp_path)
    rewrite(tmp_path, tensors | {copy: tensors[original]})
    assert_same(load_model(tmp_path), model)
    rewrite(tmp_path, {name: t for name, t in tensors.items() if name != original} | {copy: tensors[original]})
    assert_same(load_model(tmp_path), model)  # the copy stands in for the original
    for other in (tensors[original] + 1, tensors[original][:-1], tensors[original].double(), torch.zeros(0)):
        rewrite(tmp_path, tensors | {copy: other})
        refused(lambda: load_model(tmp_path), copy, original)


def test_every_tensor_must_have_a_place(folder):
    tensors = stored(folder)
    rewrite(folder, stored(folder) | {"bert.encoder.layer.0.attention.self.gate.weight": torch.ones(1)})
    refused(lambda: load_model(folder), "bert.encoder.layer.0.attention.self.gate.weight", "without it")
    for name in ("fit_denses.weight", "fit_denses.0.lora.weight", "bert.embeddings.task_types.weight", "teacher.x"):
        rewrite(folder, {f"model.{n}": t for n, t in (tensors | {name: torch.ones(1)}).items()})
        refused(lambda: load_model(folder), f"model.{name}", "config.json", "without it")


@BOTH
def test_every_parameter_must_be_filled(tmp_path, config):
    save_model(tmp_path, random_model(config))
    tensors = stored(tmp_path)
    for name in tensors:
        rewrite(tmp_path, {other: tensor for other, tensor in tensors.items() if other != name})
        refused(lambda: load_model(tmp_path), name)


def test_one_place_must_not_be_filled_twice(folder):
    tensors = stored(folder)
    for prefix in ("", "module.", "_orig_mod.", "_orig_mod.module.bert.", "model.model.", "distilbert."):
        rewrite(folder, tensors | {f"{prefix}embeddings.LayerNorm.gamma": torch.ones(4)})
        refused(lambda: load_model(folder), "bert.embeddings.LayerNorm.weight", "twice")


@BOTH
def test_shapes_must_fit_the_config(tmp_path, config):
    save_model(tmp_path, random_model(config))
    tensors = stored(tmp_path)
    for name, tensor in tensors.items():
        rewrite(tmp_path, tensors | {name: torch.zeros(tensor.shape[0] + 1, *tensor.shape[1:])})
        refused(lambda: load_model(tmp_path), name, str(tuple(tensor.shape)), str((tensor.shape[0] + 1,))[:-2])
    for odd in (torch.zeros(()), torch.zeros(4, 1), torch.zeros(0)):
        rewrite(tmp_path, tensors | {name: odd})
        refused(lambda: load_model(tmp_path), name, str(tuple(odd.shape)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8, torch.bool])
def test_weights_must_be_floats(folder, dtype):
    tensors = stored(folder)
    tensors["cls.predictions.bias"] = tensors["cls.predictions.bias"].to(dtype)
    rewrite(folder, tensors)
    refused(lambda: load_model(folder), "cls.predictions.bias", str(dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_must_be_finite(folder, value):
    tensors = stored(folder)
    tensors["bert.encoder.layer.1.output.dense.weight"][2, 3] = value
    rewrite(folder, tensors)
    refused(lambda: load_model(folder), "bert.encoder.layer.1.output.dense.weight", "not finite")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_fp32(folder, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in stored(folder).items()}
    model = load_model(folder)
    rewrite(folder, tensors)
    expected = {name: tensor.to(dtype).float() for name, tensor in model.state_dict().items()}
    model.load_state_dict(expected)
    assert_same(load_model(folder), model)


def test_fresh_head_only_where_there_is_none(folder):
    model, tensors = load_model(folder), stored(folder)
    assert_same(load_model(folder, fresh_head=True), model)
    rewrite(folder, {name: tensor for name, tensor in tensors.items() if not name.startswith("cls.")})
    refused(lambda: load_model(folder), f"give it one: `train.py --teacher none --student-init {folder}`")
    fresh = load_model(folder, fresh_head=True)
    state = model.state_dict() | weights._fresh_head(BERT)
    assert torch.equal(state["head.dense.weight"], torch.eye(4)) and (state["head.norm.weight"] == 1).all()
    assert not any(state[name].any() for name in state if re.fullmatch(r"head\..*bias", name))
    model.load_state_dict(state)
    assert_same(fresh, model)
    for name in (name for name in tensors if name.startswith("cls.")):
        rewrite(folder, {other: t for other, t in tensors.items() if other == name or not other.startswith("cls.")})
        refused(lambda: load_model(folder, fresh_head=True), "lacks cls.predictions")


# ---- models: files


def shard(folder, suffix, write, parts=3):
    """Replaces a folder's model.safetensors by shards and their index."""
    tensors = stored(folder)
    (folder / "model.safetensors").unlink()
    stem, names = ("model" if suffix == "safetensors" else "pytorch_model"), sorted(tensors)
    index = {}
    for i in range(parts):
        file = f"{stem}-{i + 1:05}-of-{parts:05}.{suffix}"
        write({name: tensors[name] for name in names[i::parts]}, folder / file)
        index |= dict.fromkeys(names[i::parts], file)
    path = folder / f"{stem}.{suffix}.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    return path, index


FILES = {
    "shards": lambda folder: shard(folder, "safetensors", lambda part, path: write_safetensors(path, part)),
    "bin": lambda folder: (
        shard(folder, "bin", torch.save, 1)[0].unlink()
        or next(folder.glob("*.bin")).rename(folder / "pytorch_model.bin")
    ),
    "bin shards": lambda folder: shard(folder, "bin", torch.save),
    "legacy bin": lambda folder: (
        torch.save(stored(folder), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False),
        (folder / "model.safetensors").unlink(),
    ),
}


@BOTH
@pytest.mark.parametrize("files", FILES)
def test_every_kind_of_file_loads(tmp_path, config, files):
    model = random_model(config)
    save_model(tmp_path, model)
    FILES[files](tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(load_model(tmp_path), model)


def test_transformers_shards_load(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size=400)
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    assert_same(load_model(tmp_path / "sharded"), load_model(folder))


def test_safetensors_go_before_pickles(folder):
    model = load_model(folder)
    torch.save({}, folder / "pytorch_model.bin")
    assert_same(load_model(folder), model)


def test_folder_without_weights_says_what_was_looked_for(folder):
    (folder / "model.safetensors").unlink()
    refused(lambda: load_model(folder), str(folder), *weights.WEIGHT_FILES)


def test_missing_shard_is_named(folder):
    _, index = FILES["shards"](folder)
    gone = folder / "model-00002-of-00003.safetensors"
    gone.unlink()
    refused(lambda: load_model(folder), gone.name, "index.json")


def test_tensor_in_two_shards_is_refused(folder):
    FILES["shards"](folder)
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors")
    refused(lambda: load_model(folder), "bert.", "another shard")


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b.safetensors", "a\0.safetensors",
     "config.json", "a.bin", ".hidden.safetensors", "a.safetensors\n", 7, None, ["a.safetensors"]],
)  # fmt: skip
def test_shard_names_stay_in_the_folder(folder, name):
    path, index = FILES["shards"](folder)
    path.write_text(json.dumps({"weight_map": index | {"bert.embeddings.LayerNorm.bias": name}}))
    refused(lambda: load_model(folder), path.name, "damaged", repr(name))


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": []}', b'{"w', b"\xff"])
def test_damaged_index_is_refused(folder, text):
    path, _ = FILES["shards"](folder)
    path.write_bytes(text)
    refused(lambda: load_model(folder), path.name)


class Malicious:
    """Creates a file when it is unpickled by anyone who trusts it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickle_is_refused_and_not_run(folder, zipped):
    FILES["bin"](folder)
    path, marker = folder / "pytorch_model.bin", folder / "marker"
    tensors = torch.load(path)
    torch.save(tensors | {"x": Malicious(marker)}, path, _use_new_zipfile_serialization=zipped)
    refused(lambda: load_model(folder), str(path), "more than tensors")
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # the trap works


def test_pickle_of_anything_but_tensors_is_refused(folder):
    FILES["bin"](folder)
    path = folder / "pytorch_model.bin"
    wide = torch.zeros(1).expand(2**40)  # four terabytes in four bytes
    for value in (
        [torch.ones(1)],
        torch.ones(1),
        {1: torch.ones(1)},
        {"a": 1},
        {"a": "text"},
        {"state_dict": {"a": torch.ones(1)}},
        {"a": torch.ones(1).to_sparse()},
        {"a": torch.ones(1, device="meta")},
        {"a": wide},
    ):
        torch.save(value, path)
        refused(lambda: load_model(folder), str(path))
    path.write_bytes(b"")
    refused(lambda: load_model(folder), str(path), "damaged")


# ---- config.json


def edited(folder, **changes):
    """Changes keys of a folder's config.json; `...` removes one."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


@BOTH
def test_config_round_trip(tmp_path, config):
    odd = Config(
        vocab_size=77, positions=9, token_types=config.token_types and 3, layers=3, heads=3, width=12, mlp_width=5,
        dropout=0.0, attention_dropout=0.25, init_range=0.5, pad_id=4, family=config.family,
        norm_eps=1e-5 if config.family == "bert" else 1e-12,
    )  # fmt: skip
    for each in (config, odd):
        write_config(tmp_path, each)
        assert read_config(tmp_path) == each


def test_config_has_exactly_the_keys_of_the_hub(tmp_path):
    transformers = pytest.importorskip("transformers")
    write_config(tmp_path, BERT_BASE.student(6))
    values = json.loads((tmp_path / "config.json").read_text())
    assert values == {
        "model_type": "distilbert", "architectures": ["DistilBertForMaskedLM"], "activation": "gelu",
        "attention_dropout": 0.1, "dim": 768, "dropout": 0.1, "hidden_dim": 3072, "initializer_range": 0.02,
        "max_position_embeddings": 512, "n_heads": 12, "n_layers": 6, "pad_token_id": 0, "qa_dropout": 0.1,
        "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": False, "tie_weights_": True, "tie_word_embeddings": True,
        "vocab_size": 30522, "torch_dtype": "float32",
    }  # fmt: skip
    read = transformers.DistilBertConfig.from_pretrained(tmp_path).to_dict()
    default = transformers.DistilBertConfig().to_dict()
    assert {key for key in read if read[key] != default.get(key)} == {"architectures", "dtype", "tie_weights_"}


def test_a_distilbert_has_one_layer_norm_eps(tmp_path):
    """transformers' has no other, whatever its config.json says."""
    with pytest.raises(ValueError, match="norm_eps is 1e-05"):
        save_model(tmp_path, random_model(dataclasses.replace(DISTILBERT, norm_eps=1e-5)))
    save_model(tmp_path, random_model(DISTILBERT))
    for eps in (1e-12, None, 1e-5, 1e-3, "1e-12"):
        edited(tmp_path, layer_norm_eps=eps)
        if eps in (1e-12, None):
            assert read_config(tmp_path) == DISTILBERT
        else:
            refused(lambda: load_model(tmp_path), "layer_norm_eps", repr(eps), "use a model with 1e-12")


def test_family_is_found_without_a_model_type(tmp_path):
    for config, family, architecture in (
        (BERT, "bert", "BertModel"), (DISTILBERT, "distilbert", "DistilBertModel"), (GPT2, "gpt2", "GPT2LMHeadModel"),
    ):  # fmt: skip
        write_config(tmp_path, config)
        edited(tmp_path, model_type=..., architectures=[architecture])
        assert read_config(tmp_path) == config and config.family == family
        edited(tmp_path, architectures=...)
        assert read_config(tmp_path) == config and config.family == family
        edited(tmp_path, architectures=["ElectraForMaskedLM"])
        refused(lambda: read_config(tmp_path), "ElectraForMaskedLM")


def test_what_differs_between_the_files_of_gpt2(tmp_path):
    """Matrices are transposed; masks are ignored; `transformer.` may be absent, and the tied head present."""
    model = random_model(GPT2)
    save_model(tmp_path, model)
    tensors = stored(tmp_path)
    up = model.encoder.blocks[1].mlp.up.weight
    assert torch.equal(tensors["transformer.h.1.mlp.c_fc.weight"], up.t()) and "lm_head.weight" not in tensors
    words = tensors["transformer.wte.weight"]
    masks = {
        f"transformer.h.{i}.attn.{name}": torch.ones(1, 1, 5, 5) for i in (0, 1) for name in ("bias", "masked_bias")
    }
    for others in ({}, masks, {"lm_head.weight": words.clone()}):
        for prefix in ("transformer.", ""):
            rewrite(tmp_path, {name.removeprefix("transformer." if not prefix else ""): tensor
                               for name, tensor in (tensors | others).items()})  # fmt: skip
            assert_same(load_model(tmp_path), model)
    rewrite(tmp_path, tensors | {"lm_head.weight": words + 1})
    refused(lambda: load_model(tmp_path), "lm_head.weight differs from transformer.wte.weight")
    rewrite(tmp_path, tensors | {"transformer.h.0.mlp.c_fc.weight": tensors["transformer.h.0.mlp.c_fc.weight"].t()})
    refused(lambda: load_model(tmp_path), "c_fc.weight has shape (6, 4), but config.json asks for (4, 6)")


@pytest.mark.parametrize("config", [BERT, DISTILBERT, ROBERTA, GPT2], ids=lambda config: config.family)
def test_a_decoder_of_its_own_is_missed(config, tmp_path):
    """transformers would fill it with random numbers; equal to the word vectors, it may be there."""
    save_model(tmp_path, random_model(config))
    edited(tmp_path, tie_word_embeddings=False)
    (copy, words), *_ = FAMILIES[config.family].tied
    refused(lambda: load_model(tmp_path), f"lacks {copy}, which its config.json says is not tied")
    tensors = stored(tmp_path)
    rewrite(tmp_path, tensors | {copy: tensors[words].clone()})
    assert_same(load_model(tmp_path), random_model(config))
    if config.family != "gpt2":  # without a head nothing is missed
        heads = ("cls.", "lm_head.", "vocab_")
        rewrite(tmp_path, {name: tensor for name, tensor in tensors.items() if not name.startswith(heads)})
        assert load_model(tmp_path, fresh_head=True).fresh_head and load_model(tmp_path, kind=SentenceEncoder)


@pytest.mark.parametrize("key, value", [
    ("activation_function", "gelu"), ("activation_function", "relu"), ("scale_attn_weights", False),
    ("scale_attn_by_inverse_layer_idx", True), ("add_cross_attention", True),
])  # fmt: skip
def test_a_gpt2_that_computes_something_else_is_refused(tmp_path, key, value):
    write_config(tmp_path, GPT2)
    edited(tmp_path, **{key: value})
    refused(lambda: read_config(tmp_path), key, repr(value))


def test_widths_that_a_gpt2_leaves_out(tmp_path):
    write_config(tmp_path, dataclasses.replace(GPT2, mlp_width=16))
    for missing in (None, ...):
        edited(tmp_path, n_inner=missing)
        assert read_config(tmp_path).mlp_width == 16
    edited(tmp_path, n_embd="wide")
    refused(lambda: read_config(tmp_path), "n_embd is 'wide'")


def test_a_gpt2_has_one_dropout_outside_attention(tmp_path):
    write_config(tmp_path, GPT2)
    for embedding, residual in ((0.0, 0.1), (..., 0.2), (0.3, ...), (0, None)):
        edited(tmp_path, embd_pdrop=embedding, resid_pdrop=residual)
        refused(lambda: read_config(tmp_path), "embd_pdrop is", "and resid_pdrop", "give both the same value")
    for embedding, residual in ((0.2, 0.2), (..., 0.1), (None, ...), (0, 0.0)):
        edited(tmp_path, embd_pdrop=embedding, resid_pdrop=residual)
        assert read_config(tmp_path).dropout == (residual if isinstance(residual, float) else 0.1)


@pytest.mark.parametrize("part", ["roberta.", "lm_head.", "cls."])
def test_bert_and_roberta_are_told_apart_by_their_tensors(tmp_path, part):
    """Their encoders have the same names, but not the same positions; an old config.json may not say which it is."""
    config, other = (ROBERTA, BERT) if part != "cls." else (BERT, ROBERTA)
    save_model(tmp_path, random_model(config))
    shape = dataclasses.replace(config, positions=config.positions + 2, family=other.family)
    write_config(tmp_path, shape)
    dropped = {"roberta.": "lm_head.", "lm_head.": "roberta.", "cls.": "bert."}[part]
    tensors = {name.removeprefix(dropped): tensor for name, tensor in stored(tmp_path).items()
               if dropped != "lm_head." or not name.startswith(dropped)}  # fmt: skip
    rewrite(tmp_path, tensors)
    for load in (lambda: load_model(tmp_path, fresh_head=True), lambda: load_pretrained(tmp_path, Classifier, 2)):
        refused(load, f"as a {config.family} does, but its config.json describes a {other.family}", "model_type")


def test_positions_of_padding_are_not_ours(tmp_path):
    """RoBERTa's table has rows for padding and what is before it; here they are cut, and written as zeros."""
    model = random_model(ROBERTA)
    save_model(tmp_path, model)
    table = stored(tmp_path)["roberta.embeddings.position_embeddings.weight"]
    assert table.shape == (7, 4) and not table[:2].any()
    assert torch.equal(table[2:], model.encoder.embeddings.positions.weight)
    edited(tmp_path, max_position_embeddings=2)
    refused(lambda: load_model(tmp_path), "positions is 0: it must be at least 1")


def test_old_config_takes_defaults_for_what_may_be_absent(folder):
    values = json.loads((folder / "config.json").read_text())
    kept = ["vocab_size", "max_position_embeddings", "num_hidden_layers", "num_attention_heads", "hidden_size"]
    edited(folder, **dict.fromkeys(values.keys() - {*kept, "intermediate_size"}, ...))
    assert read_config(folder) == BERT
    edited(folder, pad_token_id=None)
    assert read_config(folder) == BERT


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "electra"}, {"model_type": 1}, {"model_type": ["bert"]},
        {"vocab_size": ...}, {"hidden_size": ...}, {"num_hidden_layers": ...}, {"num_attention_heads": ...},
        {"intermediate_size": ...}, {"max_position_embeddings": ...},
        {"hidden_act": "gelu_new"}, {"hidden_act": "relu"}, {"hidden_act": ["gelu"]},
        {"position_embedding_type": "relative_key"}, {"is_decoder": True}, {"add_cross_attention": True},
        {"vocab_size": 0}, {"vocab_size": -5}, {"vocab_size": 11.0}, {"vocab_size": "11"}, {"vocab_size": True},
        {"vocab_size": 10**15}, {"hidden_size": 10**15}, {"num_hidden_layers": 10**9}, {"num_hidden_layers": 257},
        {"num_attention_heads": 3}, {"type_vocab_size": 0}, {"type_vocab_size": -1},
        {"pad_token_id": -1}, {"pad_token_id": 11}, {"initializer_range": 1e300},
        {"hidden_dropout_prob": -0.1}, {"hidden_dropout_prob": 1.5}, {"hidden_dropout_prob": "0.1"},
        {"hidden_dropout_prob": False}, {"layer_norm_eps": -1e-12}, {"layer_norm_eps": []},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_configs_are_refused(folder, changes):
    edited(folder, **changes)
    key, value = next(iter(changes.items()))
    words = {"num_attention_heads": "heads"}.get(key, key) if value is not ... else key
    refused(lambda: read_config(folder), "config.json", *([] if key == "model_type" else [words]))
    refused(lambda: load_model(folder))


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{", '{"vocab_size": NaN}', '{"vocab_size": 1e999}', '{"a": 1, "a": 1}', "[" * 100_000,
     '{"a":' * 100_000, "\xff\xfe{}", '{"vocab_size": ' + "9" * 5000 + "}"],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
def test_damaged_configs_are_refused(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(lambda: read_config(folder), str(folder / "config.json"))


def test_json_has_no_nan_even_where_nobody_looks(folder):
    edited(folder, temperature=float("nan"))
    refused(lambda: read_config(folder), "config.json", "NaN")


def test_gelu_python_is_gelu(folder):
    edited(folder, hidden_act="gelu_python")
    assert read_config(folder) == BERT
    ids = torch.tensor([[1, 2, 3]])
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    assert theirs.config.hidden_act == "gelu_python"
    torch.testing.assert_close(load_model(folder)(ids), theirs(ids).last_hidden_state, rtol=0, atol=1e-5)
    for approximation in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "relu", "silu"):
        edited(folder, hidden_act=approximation)
        refused(lambda: load_model(folder), f"hidden_act is '{approximation}'", "use a model with 'gelu'")


def test_null_metadata_is_none(folder):
    header = {"__metadata__": None, "a": entry(shape=[], offsets=[0, 4])}
    (folder / "x.safetensors").write_bytes(file_of(json.dumps(header).encode(), struct.pack("<f", 1.5)))
    assert read_safetensors(folder / "x.safetensors") == ({"a": torch.tensor(1.5)}, {})
    assert pytest.importorskip("safetensors.torch").load_file(folder / "x.safetensors") == {"a": torch.tensor(1.5)}


def test_a_folder_that_is_no_model_says_what_to_give(tmp_path):
    """Old names, TensorFlow's release, sentence-transformers' folder, a vocabulary alone, a file."""
    inner = tmp_path / "sentences" / "0_Transformer"
    save_model(inner, random_model(BERT))
    refused(lambda: resolve(str(inner.parent)), "sentences has no config.json", f"give {inner}")
    assert resolve(str(inner)) == inner
    inner.with_name("modules.json").write_text("[]")
    refused(lambda: resolve(str(inner.parent)), "modules.json does not list modules")
    inner.with_name("modules.json").write_text(
        '[{"path": "0_Transformer", "type": "sentence_transformers.Transformer"}]'
    )
    assert resolve(str(inner.parent)) == inner
    refused(lambda: resolve(str(inner / "model.safetensors")), "is a file", f"such as {inner}")
    old = tmp_path / "old"
    shutil.copytree(inner, old)
    (old / "config.json").rename(old / "bert_config.json")
    refused(lambda: resolve(str(old)), "rename its bert_config.json to config.json")
    (old / "bert_config.json").rename(old / "config.json")
    load_model(resolve(str(old)))
    google = tmp_path / "google"
    google.mkdir()
    for name in ("bert_config.json", "vocab.txt", "bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00001"):
        (google / name).write_text("{}")
    refused(lambda: resolve(str(google)), "google has no config.json", "TensorFlow")
    (google / "bert_config.json").unlink()
    refused(lambda: resolve(str(google)), "give the folder of a model")


def test_missing_config_is_named(tmp_path):
    refused(lambda: load_model(tmp_path), str(tmp_path), "config.json")


def test_weights_of_another_family_or_depth_are_refused(folder):
    edited(folder, num_hidden_layers=1)
    refused(lambda: load_model(folder), "bert.encoder.layer.1.")
    edited(folder, num_hidden_layers=3)
    refused(lambda: load_model(folder), "bert.encoder.layer.2.")
    write_config(folder, DISTILBERT)
    refused(lambda: load_model(folder), "bert.")


# ---- random damage


def mutations(raw, head, n, seed):
    """Yields n damaged versions of `raw`: bits flipped, bytes changed, cut, inserted, removed; mostly in [0, head)."""
    rng = random.Random(seed)
    tokens = [b"0", b"9", b"-", b"[", b'"', b"}", b",", b"1e9", b"true", b"null", b"NaN", b"99999999999999999999"]
    while n:
        data = bytearray(raw)
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            i = rng.randrange(max(1, min(len(data), head) if rng.random() < 0.7 else len(data)))
            match rng.choice(["bit", "bit", "byte", "cut", "remove", "insert", "token", "copy"]):
                case "bit" if i < len(data):
                    data[i] ^= 1 << rng.randrange(8)
                case "byte" if i < len(data):
                    data[i] = rng.randrange(256)
                case "cut":
                    del data[i:]
                case "remove":
                    del data[i : i + rng.choice([1, 2, 8, 100])]
                case "insert":
                    data[i:i] = rng.randbytes(rng.choice([1, 2, 8]))
                case "token":
                    data[i : i + 1] = rng.choice(tokens)
                case "copy":
                    j = rng.randrange(max(1, len(data)))
                    data[i : i + 8] = data[j : j + 8]
        if data != raw:
            n -= 1
            yield bytes(data)


def survives(path, head, load, seed):
    """Asserts that each damaged version of a file loads or raises UserError in one line; returns the share refused."""
    raw, refusals = path.read_bytes(), 0
    for data in mutations(raw, head or len(raw), MUTATIONS, seed):
        path.write_bytes(data)
        try:
            load()
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error)
    return refusals / MUTATIONS


def touch(tensors):
    """Reads every byte of some tensors."""
    return [tensor.reshape(-1).view(torch.uint8).sum().item() for tensor in tensors]


def header_size(path):
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


def test_random_damage_to_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, ODD_TENSORS)
    assert survives(path, header_size(path), lambda: touch(read_safetensors(path)[0].values()), seed=1) > 0.5


EACH_LAYOUT = pytest.mark.parametrize("config", [BERT, GPT2, ROBERTA], ids=lambda config: config.family)


@EACH_LAYOUT
def test_random_damage_to_models(config, tmp_path):
    save_model(tmp_path, random_model(config))
    path = tmp_path / "model.safetensors"
    assert survives(path, header_size(path), lambda: touch(load_model(tmp_path).parameters()), seed=2) > 0.5


@EACH_LAYOUT
def test_random_damage_to_configs(config, tmp_path):
    save_model(tmp_path, random_model(config))
    assert survives(tmp_path / "config.json", None, lambda: touch(load_model(tmp_path).parameters()), seed=3) > 0.5


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("files", ["bin", "legacy bin"])
def test_random_damage_to_pickles(folder, files):
    FILES[files](folder)
    path = folder / "pytorch_model.bin"
    assert survives(path, None, lambda: touch(read_weights(folder).values()), seed=4) > 0.3


def test_random_damage_to_indices(folder):
    path, _ = FILES["shards"](folder)
    assert survives(path, None, lambda: touch(read_weights(folder).values()), seed=5) > 0.5


@pytest.mark.parametrize("head", ["header", "all"])
def test_every_damage_to_a_checksummed_file_is_found(tmp_path, head):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, ODD_TENSORS, {"step": "12"}, checksum=True)
    raw = path.read_bytes()
    read_safetensors(path, checksum=True)
    for data in mutations(raw, header_size(path) if head == "header" else len(raw), MUTATIONS, seed=6):
        path.write_bytes(data)
        refused(lambda: read_safetensors(path, checksum=True), str(path), "damaged")


# ---- students


def test_student_layers_are_spread_evenly():
    assert student_layers(12) == [0, 2, 4, 7, 9, 11]
    assert student_layers(12, 12) == list(range(12)) and student_layers(12, 2) == [0, 11]
    assert student_layers(6) == [0, 2, 5] and student_layers(3) == student_layers(1) == [0]
    for L in range(1, 30):
        for k in range(1, L + 1):
            layers = student_layers(L, k)
            assert len(set(layers)) == k and layers == sorted(layers) and layers[0] == 0 and 0 <= layers[-1] < L
    for k in (0, -1, 13):
        refused(lambda k=k: student_layers(12, k), "12")


@BOTH
def test_student_of_all_layers_computes_what_its_teacher_does(config):
    teacher = random_model(config)
    student = student_from_teacher(teacher, [0, 1])
    assert student.config == DISTILBERT and student.training
    student.eval()
    ids = torch.randint(config.vocab_size, (4, 5), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(student.logits(student(ids)), teacher.logits(teacher(ids)), atol=1e-5, rtol=1e-5)


def test_student_takes_the_layers_it_is_told(tmp_path):
    teacher = random_model(Config(vocab_size=11, positions=5, layers=4, heads=2, width=4, mlp_width=6))
    teacher.requires_grad_(False)
    student = student_from_teacher(teacher, [3, 0, 2])
    for i, layer in enumerate([3, 0, 2]):
        ours, theirs = student.encoder.blocks[i].state_dict(), teacher.encoder.blocks[layer].state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sum(p.numel() for p in student.parameters()) == num_params(student.config)
    # memory of its own, to be trained
    shared = {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in student.parameters()}
    assert not shared and all(p.requires_grad for p in student.parameters())
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    for layers in ([], [4], [-1], [0, 1, 7]):
        refused(lambda layers=layers: student_from_teacher(teacher, layers), str(layers), "0 to 3")


@pytest.mark.parametrize("eps", [1e-12, 1e-13, 1e-5, 1e-3, 0.1])
def test_exported_student_is_what_transformers_computes(tmp_path, eps):
    """To the rounding, whatever the teacher's epsilon: where a DistilBERT cannot have it, it is a BERT."""
    transformers = pytest.importorskip("transformers")
    teacher = random_model(dataclasses.replace(BERT, norm_eps=eps))
    student = student_from_teacher(teacher, [0, 1]).eval()
    ids = torch.randint(11, (3, 5))
    torch.testing.assert_close(student.logits(student(ids)), teacher.logits(teacher(ids)), atol=1e-5, rtol=1e-5)
    student = student_from_teacher(teacher, [1]).eval()
    save_model(tmp_path, student)
    assert_same(load_model(tmp_path), student)
    assert read_config(tmp_path).family == ("distilbert" if eps == 1e-12 else "bert")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        difference = (student.logits(student(ids)) - theirs(ids).logits).abs().max()
    assert difference < 3e-6  # rounding


def test_real_checkpoint_round_trips(assets, tmp_path):
    folder = assets / "models" / "bert-tiny-mlm"
    model = load_model(folder)
    save_model(tmp_path, model)
    assert_same(load_model(tmp_path), model)
    size = sum(os.path.getsize(p / "model.safetensors") for p in (folder, tmp_path))
    assert abs(os.path.getsize(tmp_path / "model.safetensors") - size / 2) < 1000
    assert pathlib.Path(tmp_path / "config.json").read_text().endswith("}\n")
