"""Exported folders in transformers.js, under node and in a browser without a network: the answers are ours."""

import contextlib
import functools
import http.server
import json
import pathlib
import shutil
import subprocess
import threading

import numpy as np
import pytest
import torch

import export
from data import vocab
from minidistil import weights
from minidistil.downstream.batches import encode_pair
from minidistil.downstream.heads import Classifier, SpanReader, load_pretrained
from minidistil.export.graphs import open_graph, to_onnx
from minidistil.export.session import Session
from minidistil.generate import continuation
from minidistil.model import Config, LanguageModel
from minidistil.pooling import Pooling, SentenceEncoder, write_pooling
from minidistil.student import student_from_teacher
from minidistil.tokenizer import Tokenizer

for library in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(library, reason="pip install -r requirements-export.txt")

ROOT = pathlib.Path(__file__).resolve().parent.parent
JS = ROOT / "tests" / "js"
TEXT = "The function returns a new array of the given shape and type."
BLANK = "Returns the {} of the elements along the given axis."
QUESTION = "What does the function return?"
DTYPES = {"fp32": "model.onnx", "q8": "model_quantized.onnx"}


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """Folders of each kind, exported in fp32 and int8: four of a student's encoder, a random RoBERTa and a GPT-2."""
    top = tmp_path_factory.mktemp("models")
    demo, text = ROOT / "data" / "demo", str(tiny / "text.txt")
    tokenizer = Tokenizer.load(demo)
    weights.save_model(top / "words", student_from_teacher(weights.load_model(demo), [0, 3]))
    words, sentences = (weights.load_model(top / "words", kind=kind) for kind in (LanguageModel, SentenceEncoder))
    labels, spans = load_pretrained(top / "words", Classifier, 3), load_pretrained(top / "words", SpanReader, 2)
    with torch.no_grad():  # heads with opinions
        labels.pool.weight.mul_(10), labels.classify.weight.mul_(10), spans.answer.weight.mul_(20)
    named = {"id2label": {"0": "red", "1": "green", "2": "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}
    for name, model, extra in (
        ("words", words, {}), ("sentences", sentences, {}), ("labels", labels, named), ("spans", spans, {}),
    ):  # fmt: skip
        weights.save_model(top / name, model, **extra)
        tokenizer.max_length = model.config.positions
        tokenizer.save(top / name, model.config.family)
    write_pooling(top / "sentences", Pooling(normalize=True), sentences.config)
    for family in ("roberta", "gpt2"):
        vocab.main([text, "--byte-level", family, "--size", "600", "--workers", "1", "--out", str(top / "vocab")])
        tokenizer = Tokenizer.load(top / "vocab")
        config = Config(
            vocab_size=len(tokenizer.vocab), positions=48, token_types=int(family == "roberta"), layers=2, heads=2,
            width=32, mlp_width=64, norm_eps=1e-5, pad_id=tokenizer.pad_id if family == "roberta" else 0,
            init_range=0.2, family=family,
        )  # fmt: skip
        (top / family).mkdir()
        weights.save_model(top / family, LanguageModel(config, seed=1), **tokenizer.hub_ids)
        tokenizer.max_length = config.positions
        tokenizer.save(top / family, family)
        shutil.rmtree(top / "vocab")
    for folder in top.iterdir():
        made = []  # the graph, of which both files are made: it takes most of the time
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export, "to_onnx", lambda graph, made=made: (made or made.append(to_onnx(graph)) or made)[0])
            for to in export.FILES:
                export.export(export.Settings(str(folder), to, data=text, sentences=20, max_loss=100))
    return top


def outputs(models, name, dtype, item):
    """What a folder's model says of an item: our model in fp32, else the file, in onnxruntime."""
    graph, (ids, types) = open_graph(models / name), (torch.tensor([part]) for part in item)
    if dtype == "fp32":
        with torch.no_grad():
            return [each[0] for each in graph.ours(ids, None, types)]
    return [each[0] for each in Session(models / name / "onnx" / DTYPES[dtype])(ids, None, types)]


def fill(name, models, dtype, tokenizer):
    text = BLANK.format(tokenizer.special["mask"])
    ids = tokenizer.encode_prompt(text)
    (logits,) = outputs(models, name, dtype, (ids, [0] * len(ids)))
    shares = torch.softmax(logits[ids.index(tokenizer.mask_id)], -1)
    best = shares.topk(5)
    expected = [{"token": i, "score": p} for p, i in zip(*(x.tolist() for x in best), strict=True)]
    return {"task": "fill-mask", "inputs": [text], "options": {"top_k": 5}}, ids, expected


def embed(name, models, dtype, tokenizer):
    ids, types = encode_pair(tokenizer, TEXT, None, 512)
    (hidden,) = outputs(models, name, dtype, (ids, types))
    vector = torch.nn.functional.normalize(hidden.mean(0), dim=-1)
    options = {"pooling": "mean", "normalize": True}
    return {"task": "feature-extraction", "inputs": [TEXT], "options": options}, ids, vector.tolist()


def classify(name, models, dtype, tokenizer):
    ids, types = encode_pair(tokenizer, TEXT, None, 512)
    shares = torch.softmax(outputs(models, name, dtype, (ids, types))[0], -1)
    names = ("red", "green", "blue")
    expected = [{"label": names[i], "score": shares[i].item()} for i in shares.argsort(descending=True)]
    return {"task": "text-classification", "inputs": [TEXT], "options": {"top_k": 3}}, ids, expected


def answer(name, models, dtype, tokenizer):
    """The likeliest span of the text, as the pipeline counts: softmax over [CLS] and the text, then no [CLS]."""
    ids, types = encode_pair(tokenizer, QUESTION, TEXT, 512)
    inside = np.array(types, bool) & (np.array(ids) != tokenizer.sep_id)
    inside[0] = True
    start, end = (
        torch.softmax(each.masked_fill(~torch.from_numpy(inside), -torch.inf), -1).numpy()
        for each in outputs(models, name, dtype, (ids, types))
    )
    start[0] = end[0] = 0
    scores = np.triu(start[:, None] * end[None])
    first, last = np.unravel_index(scores.argmax(), scores.shape)
    expected = {"answer": tokenizer.decode(ids[first : last + 1]), "score": scores.max().item()}
    return {"task": "question-answering", "inputs": [QUESTION, TEXT], "options": {}}, None, expected


def go_on(name, models, dtype, tokenizer):
    """The likeliest continuation: in fp32 our model's; in int8 the file's, which reads one token after the other."""
    prompt = "bhdb bhfa"
    ids = tokenizer.encode(prompt)
    if dtype == "fp32":
        new = continuation(weights.load_model(models / name), ids, 12, temperature=0, end=tokenizer.sep_id)
    else:
        new, read, session = [], ids, Session(models / name / "onnx" / DTYPES[dtype])
        past = {key: np.zeros((1, 2, 0, 16), np.float32) for key in session.inputs if key.startswith("past")}
        for _ in range(12):
            n = len(ids) + len(new)
            given = {"input_ids": [read], "attention_mask": [[1] * n], "position_ids": [range(n - len(read), n)]}
            logits, *kept = session.session.run(None, {k: np.array(v) for k, v in given.items()} | past)
            past = dict(zip(past, kept, strict=True))
            read = [int(logits[0, -1].argmax())]
            new += read
    expected = [{"generated_text": tokenizer.decode(ids + new)}]
    options = {"max_new_tokens": 12, "do_sample": False}
    return {"task": "text-generation", "inputs": [prompt], "options": options}, ids, expected


ASKED = {"words": fill, "roberta": fill, "sentences": embed, "labels": classify, "spans": answer, "gpt2": go_on}


@pytest.fixture(scope="module")
def asked(models):
    """Cases for transformers.js, and what Python makes of each: (case, ids or None, answer)."""
    found = []
    for name, ask in ASKED.items():
        for dtype in DTYPES:
            case, ids, expected = ask(name, models, dtype, Tokenizer.load(models / name))
            found.append(({"model": name, "dtype": dtype, **case}, ids, expected))
    return found


def close(found, expected, tolerance):
    """Whether two JSON values are equal, numbers up to `tolerance`; `found` may have more keys."""
    if isinstance(expected, dict):
        return all(close(found[key], value, tolerance) for key, value in expected.items())
    if isinstance(expected, list):
        pairs = zip(found, expected, strict=True)
        return len(found) == len(expected) and all(close(a, b, tolerance) for a, b in pairs)
    return abs(found - expected) <= tolerance if isinstance(expected, float) else found == expected


def check(answers, asked):
    for answer, (case, ids, expected) in zip(answers, asked, strict=True):
        if ids is not None:
            assert answer["ids"] == ids, case
        if expected is None:  # whatever follows, something does
            assert len(answer["output"][0]["generated_text"]) > len(case["inputs"][0])
        else:
            assert close(answer["output"], expected, 1e-4 if case["dtype"] == "fp32" else 5e-3), (
                case,
                answer,
                expected,
            )


def installed():
    if not shutil.which("node"):
        pytest.skip("node is not installed")
    if not (JS / "node_modules" / "@huggingface" / "transformers").is_dir():
        pytest.skip("transformers.js is not installed: npm ci --ignore-scripts --prefix tests/js")


def test_under_node(models, asked):
    installed()
    cases = [{**case, "device": "cpu"} for case, _, _ in asked]
    done = subprocess.run(
        ["node", JS / "node.mjs", str(models)], input=json.dumps(cases), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    check(json.loads(done.stdout.splitlines()[-1]), asked)


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves the page with its modules, the models and the cases; stores what the page sends."""

    def __init__(self, *arguments, models, cases, results, **keywords):
        self.models, self.cases, self.results = models, cases, results
        super().__init__(*arguments, directory=str(JS), **keywords)

    def translate_path(self, path):
        inside = path.partition("?")[0].removeprefix("/models/")
        return str(self.models / inside) if path.startswith("/models/") else super().translate_path(path)

    def do_GET(self):
        if self.path != "/cases.json":
            return super().do_GET()
        data = json.dumps(self.cases).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        self.results.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()
        self.results[0]["arrived"] = True

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def serving(**given):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, **given))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
).split()


def test_in_a_browser(models, asked, tmp_path):
    """Every name but that of this computer leads nowhere, so that a page which needs another file fails."""
    installed()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("Chromium is not installed")
    results, cases = [], [{**case, "device": "wasm"} for case, _, _ in asked]
    with serving(models=models, cases=cases, results=results) as address:
        nowhere = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        command = [chromium, *FLAGS, nowhere, f"--user-data-dir={tmp_path}", f"{address}/page.html"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
            waiting = threading.Event()
            for _ in range(600):
                if results or browser.poll() is not None:
                    break
                waiting.wait(0.5)
            browser.terminate()
    assert results, "the page sent nothing"
    assert "error" not in results[0], results[0]
    check(results[0]["answers"], asked)
