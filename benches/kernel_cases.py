"""The computations of `bench.py loss | linear | layernorm | cosine`: inputs and providers.

A case makes inputs for a shape, says which of them require a gradient (`leaves`), and defines its providers: functions
of these inputs whose result is differentiated. Eager PyTorch is written the usual way; in fp64 it is the definition.
"""

import torch
import torch.nn.functional as F

from kernels import cosine, distill_kl, layer_norm, linear_distill_kl

TAU, ALPHA_KL, ALPHA_CE = 2.0, 5.0, 2.0  # of the released DistilBERT


def generator(device):
    return torch.Generator(device).manual_seed(0)


def some_labels(N, V, share, device):
    """Returns (labels, their number): the first `share` of N rows have a label, the others have none."""
    labels, n = torch.randint(0, V, (N,), device=device, generator=generator(device)), max(1, round(share * N))
    labels[n:] = distill_kl.IGNORE
    return labels, n


def by_definition(s, t, labels):
    """The loss in plain PyTorch: means over rows and over labels."""
    kl = F.kl_div(F.log_softmax(s / TAU, -1), F.softmax(t / TAU, -1), reduction="batchmean") * TAU**2
    return ALPHA_KL * kl + ALPHA_CE * F.cross_entropy(s, labels)


class Case:
    """What the cases share; `sizes` are the shapes of a test run, on a CPU and on a GPU."""

    also_on_gpu = ()  # further variants of ours, whose inputs `prepared` makes
    liger, liger_on_cpu = None, False  # None: Liger has no such kernel

    def shapes(self, device, tiny):
        return self.sizes["tiny" if tiny else device.type]

    def prepared(self, provider, inputs):
        return inputs


class Loss(Case):
    """KL and cross-entropy of given logits."""

    name, leaves = "loss", (0,)
    also_on_gpu = ("ours, unpadded rows",)  # as F.linear makes them: row stride 30,522
    sizes = {
        "tiny": [dict(N=8, V=1000, labelled=1.0, dtype="float32")],
        "cpu": [dict(N=512, V=30522, labelled=1.0, dtype=dtype) for dtype in ("float32", "bfloat16")],
        "cuda": [  # few rows; the masked ones of 64 x 512 tokens; all of these
            dict(N=N, V=30522, labelled=share, dtype="bfloat16")
            for N, share in ((512, 1.0), (4915, 1.0), (32768, 0.15))
        ],
    }

    def inputs(self, shape, device):
        N, V, g = shape["N"], shape["V"], generator(device)
        s, t = (torch.randn(N, V, device=device, generator=g).mul_(3).to(getattr(torch, shape["dtype"])) for _ in "st")
        return [s, t, *some_labels(N, V, shape["labelled"], device)]

    def prepared(self, provider, inputs):
        """Pads our rows for the kernel, as the fused projection does."""
        s, t, *labels = inputs
        if provider == "ours" and s.is_cuda:
            s, t = (distill_kl.padded(*x.shape, x.dtype, x.device).copy_(x) for x in (s, t))
        return [s, t, *labels]

    def ours(self, s, t, labels, n):
        kl, ce = distill_kl.distill_kl(s, t, labels, TAU)
        return ALPHA_KL / len(s) * kl + ALPHA_CE / n * ce

    def eager(self, s, t, labels, n):
        return by_definition(s, t, labels)

    def liger(self, shape):
        from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss

        divergence, cross_entropy = LigerKLDIVLoss(reduction="batchmean"), LigerCrossEntropyLoss()

        def loss(s, t, labels, n):
            kl = divergence(F.log_softmax(s.float() / TAU, -1), F.softmax(t.float() / TAU, -1)) * TAU**2
            return ALPHA_KL * kl + ALPHA_CE * cross_entropy(s.clone(), labels)  # Liger overwrites its input

        return loss

    def bytes(self, shape):
        return distill_kl.bytes_moved(shape["N"], shape["V"], getattr(torch, shape["dtype"]).itemsize)


class Linear(Case):
    """Vocabulary projection of both models, and the loss."""

    name, leaves, liger_on_cpu = "linear", (0, 1, 2), True
    sizes = {
        "tiny": [dict(N=8, V=1000, C=64, labelled=1.0, dtype="float32")],
        "cpu": [
            dict(N=N, V=V, C=C, labelled=1.0, dtype="float32")
            for N, V, C in ((512, 30522, 768), (2048, 30522, 768), (1024, 250037, 384))
        ],
        "cuda": [dict(N=N, V=30522, C=768, labelled=part, dtype="bfloat16") for N, part in ((4915, 1), (32768, 0.15))],
    }

    def inputs(self, shape, device):
        """Returns fp32 parameters, as in training; bf16 means autocast."""
        N, V, C, g = shape["N"], shape["V"], shape["C"], generator(device)
        tensors = [torch.randn(size, device=device, generator=g) for size in ((N, C), (V, C), (V,)) * 2]
        for W in (tensors[1], tensors[4]):
            W.mul_(3 / C**0.5)
        return [*tensors, *some_labels(N, V, shape["labelled"], device)]

    def ours(self, h_s, W_s, b_s, h_t, W_t, b_t, labels, n):
        weights = ALPHA_KL / len(h_s), ALPHA_CE / n
        return linear_distill_kl.linear_distill_kl(h_s, W_s, b_s, h_t, W_t, b_t, labels, TAU, *weights)[0]

    def eager(self, h_s, W_s, b_s, h_t, W_t, b_t, labels, n):
        with torch.no_grad():
            t = F.linear(h_t, W_t, b_t)
        return by_definition(F.linear(h_s, W_s, b_s), t, labels)

    def liger(self, shape):
        """Liger's chunked and compiled loss, its faster one: forward KL is its JSD with beta 0, without tau^2."""
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        both = LigerFusedLinearJSDLoss(ALPHA_CE, ALPHA_KL * TAU**2, beta=0.0, temperature=TAU)

        def loss(h_s, W_s, b_s, h_t, W_t, b_t, labels, n):
            return both(h_s, W_s, h_t, W_t, labels, b_s, b_t)

        loss.computes_less = shape["labelled"] < 1  # no KL on rows without a label
        return loss

    def bytes(self, shape):
        """Logits written and read, their gradient written and read for dh, dW and db; weights and weight gradients."""
        itemsize = getattr(torch, shape["dtype"]).itemsize
        return 8 * shape["N"] * shape["V"] * itemsize + 5 * shape["V"] * shape["C"] * 4


class LayerNorm(Case):
    """LayerNorm(dropout(x) + residual)."""

    name, leaves = "layernorm", (0, 1, 2, 3)
    sizes = {
        "tiny": [dict(N=16, C=64, p=0.1, dtype="float32")],
        "cpu": [dict(N=4096, C=768, p=p, dtype="float32") for p in (0.0, 0.1)],
        "cuda": [dict(N=32768, C=768, p=p, dtype="bfloat16") for p in (0.0, 0.1)],
    }

    def inputs(self, shape, device):
        N, C, g = shape["N"], shape["C"], generator(device)
        x, r = (torch.randn(N, C, device=device, generator=g).to(getattr(torch, shape["dtype"])) for _ in "xr")
        weight, bias = (torch.randn(C, device=device, generator=g) for _ in "wb")
        return [x, r, weight, bias, shape["p"]]

    def ours(self, x, r, weight, bias, p):
        return layer_norm.dropout_add_layer_norm(x, r, weight, bias, 1e-12, p)

    def eager(self, x, r, weight, bias, p):
        z = F.dropout(x, p) + r
        return F.layer_norm(z, weight.shape, weight.to(z.dtype), bias.to(z.dtype), 1e-12)

    def liger(self, shape):
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        def norm(x, r, weight, bias, p):
            z = F.dropout(x, p) + r
            return LigerLayerNormFunction.apply(z, weight.to(z.dtype), bias.to(z.dtype), 1e-12)

        return norm

    def bytes(self, shape):
        return layer_norm.bytes_moved(shape["N"], shape["C"], getattr(torch, shape["dtype"]).itemsize, shape["p"])


class Cosine(Case):
    """Cosine distance of hidden states, summed over rows."""

    name, leaves = "cosine", (0,)
    sizes = {
        "tiny": [dict(N=16, C=64, dtype="float32")],
        "cpu": [dict(N=4096, C=768, dtype="float32")],
        "cuda": [dict(N=32768, C=768, dtype="bfloat16")],
    }

    def inputs(self, shape, device):
        N, C, g = shape["N"], shape["C"], generator(device)
        return [torch.randn(N, C, device=device, generator=g).to(getattr(torch, shape["dtype"])) for _ in "ab"]

    def ours(self, a, b):
        return cosine.cosine_distance(a, b)

    def eager(self, a, b):
        wide = torch.promote_types(a.dtype, torch.float32)
        return cosine.cosine_distance_ref(a.to(wide), b.to(wide))

    def bytes(self, shape):
        return cosine.bytes_moved(shape["N"], shape["C"], getattr(torch, shape["dtype"]).itemsize)


CASES = {case.name: case for case in (Loss(), Linear(), LayerNorm(), Cosine())}
